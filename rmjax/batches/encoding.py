"""From texts to token ids: as the tokenizer alone would, but what neighbours share is done once."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

Sequences = list[list[int]]


class Encoder:
    """Tokenizes renderings; special tokens only where the text has them, so never a second BOS."""

    def __init__(self, tokenizer: Any, rendering: str):
        """Takes the transformers tokenizer, and a rendering that has the special tokens of its chat template."""
        self._tokenizer = tokenizer
        self._borders = _borders(tokenizer, rendering)
        self._pattern = re.compile("|".join(map(re.escape, self._borders)) or "(?!)")  # the last matches nothing

    def encode(self, texts: Sequence[str]) -> Sequences:
        """Token ids of each text, exactly those that it has alone.

        What a text shares with the one before it, up to a special token, is tokenized once: special tokens are taken
        out of a text before anything else is done to it, so what follows one does not depend on what precedes it.
        """
        borders = [list(self._pattern.finditer(text)) for text in texts]
        shared = [0] * len(texts)  # borders up to and including the one that the rest begins with
        for i, found in enumerate(borders[1:], 1):
            alike = (n for n in range(len(found), 0, -1) if texts[i - 1].startswith(texts[i][: found[n - 1].end()]))
            shared[i] = next(alike, 0)
        rests = [text[found[n - 1].start() :] if n else text for text, found, n in zip(texts, borders, shared)]
        encoded = self._encode(rests)
        for i, n in enumerate(shared):
            if n:
                start = self._after(encoded[i - 1], borders[i - 1], n)
                encoded[i] = encoded[i - 1][:start] + encoded[i][1:] if start else self._encode([texts[i]])[0]
        return encoded

    def _encode(self, texts: Sequence[str]) -> Sequences:
        if not texts:
            return []
        if not self._borders:
            return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        backend = self._tokenizer.backend_tokenizer
        if backend.truncation or backend.padding or backend.encode_special_tokens:  # a change waits for other threads
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = False
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _after(self, tokens: list[int], borders: Sequence[re.Match[str]], n: int) -> int:
        """Where the tokens after the `n`th border begin; 0 if the borders of the text are not those of the tokens."""
        if sum(map(tokens.count, self._borders.values())) != len(borders):
            return 0
        last = -1
        for border in borders[:n]:
            last = tokens.index(self._borders[border[0]], last + 1)
        return last + 1


def _borders(tokenizer: Any, rendering: str) -> dict[str, int]:
    """Ids of the special tokens of a rendering that are found in any text, whatever stands beside them.

    None for a tokenizer that does more than its backend.
    """
    if not tokenizer.is_fast or tokenizer.split_special_tokens:
        return {}
    alone = tokenizer.backend_tokenizer.encode(rendering, add_special_tokens=False).ids
    if tokenizer(rendering, add_special_tokens=False, verbose=False)["input_ids"] != alone:
        return {}
    added = tokenizer.added_tokens_decoder
    plain = lambda token: not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    within = lambda word: sum(word in token.content for token in added.values()) > 1  # a longer one could win
    return {t.content: i for i, t in added.items() if t.content in rendering and plain(t) and not within(t.content)}


def json_digest(value: Any) -> str:
    """SHA-256, as hex, of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256, as hex, of the tokenizer's parts, without what calls change and what only decoding reads."""
    if not tokenizer.is_fast:
        parts: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
        return json_digest(parts)
    backend = tokenizer.backend_tokenizer
    flags = lambda token: [token.content, token.single_word, token.lstrip, token.rstrip, token.normalized]
    added = [[i, *flags(token)] for i, token in sorted(backend.get_added_tokens_decoder().items())]
    states = [part.__getstate__() if part else b"" for part in (backend.normalizer, backend.pre_tokenizer)]
    digest = hashlib.sha256(json.dumps([added, [state.decode() for state in states]]).encode())
    digest.update(backend.model.__getstate__())  # megabytes of JSON, in the order of the ids
    return digest.hexdigest()

"""Bodies are parsed as json does, others run meanwhile, and what cannot fit is refused before it is tokenized."""

import json
import random
import threading

import pytest
import transformers
from tokenizers import Tokenizer, normalizers

from rmjax.batches.chat import Chat
from rmjax.serve import bodies
from rmjax.serve.inputs import Reader, Refused, characters_per_token

DOCUMENTS = [
    {"input": [[i, i + 1] for i in range(9_000)]},
    {"input": list(range(30_000)), "b": [1.5e3, -2, None, True, "x,\n\u00e9\U0001f600", {"": {}}], "c": []},
    {"text_1": 'a, b, [c] {d} \\ " ' * 9_000, "text_2": ["x", "y"]},
]


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("ascii", [True, False])
def test_many_values_are_parsed_as_json_does(document, ascii):
    data = bytearray(json.dumps(document, ensure_ascii=ascii).encode())
    assert data.count(b",") > bodies.AT_ONCE / 3 and bodies.parse(data) == document


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"input": [' + b"[]," * 30_000 + b"[]]}", "more than 20,000 lists"),
        (b"{" + b",".join(b'"%d": 1' % i for i in range(30_000)) + b"}", "more than 20,000 lists"),
        (b'{"input": ' + b"[" * 100_000, "not JSON"),
        (b'{"input": [' + b"1," * 30_000 + b"]", "not JSON"),
        (b"[" + b"1," * 30_000 + b"1]", "is a list, expected an object"),
        (b'{"input": "\xff' + b"," * 30_000 + b'"}', "not JSON"),
    ],
)
def test_what_is_wrong_with_many_values_is_told(data, words):
    with pytest.raises(Refused, match=words) as refused:
        bodies.parse(bytearray(data))
    assert refused.value.code == 400


def test_other_threads_run_while_many_values_are_parsed():
    ended, turns = threading.Event(), []
    other = threading.Thread(target=lambda: [turns.append(1) for _ in iter(lambda: ended.wait(0.001), True)])
    other.start()
    bodies.parse(bytearray(b'{"input": [' + b"1," * 500_000 + b"1]}"))
    ended.set()
    other.join()
    assert len(turns) >= 10  # json alone: 0 or 1


def test_a_token_has_no_more_characters_than_is_said(tokenizer):
    most, draw = characters_per_token(tokenizer), random.Random(0)
    words = [*tokenizer.get_vocab(), "  ", "\n\n", "é", "漢", "\U0001f600", "tree", *tokenizer.all_special_tokens]
    assert 0 < most < 40
    for _ in range(300):
        text = "".join(draw.choices(words, k=draw.randint(1, 40)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(text) <= most * len(ids)


def rendered(answer):
    return f"<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def _with(tokenizer, change):
    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    change(made)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_normalizer_may_shorten_a_text(tokenizer):
    plain = characters_per_token(tokenizer)
    for change in (
        lambda t: setattr(t, "normalizer", normalizers.NFC()),
        lambda t: setattr(t, "normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    ):
        assert characters_per_token(_with(tokenizer, change)) == 4 * plain


class Slow:
    """A tokenizer that only Python knows: it is used by one thread at a time."""

    is_fast, bos_token_id, bos_token = False, None, None

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **kwargs):
        return self._tokenizer(*args, **kwargs)


@pytest.mark.parametrize("slow", [False, True])
def test_what_cannot_fit_is_refused_before_it_is_tokenized(slow, tokenizer, monkeypatch):
    chat = Chat(Slow(tokenizer) if slow else tokenizer)
    reader = Reader(chat, "tiny", vocabulary=1_000, max_length=50, most=1_000)
    assert reader.inputs({"input": rendered("tree " * 10)}).tokens
    seen, plain = [], chat.encode
    monkeypatch.setattr(chat, "encode", lambda texts: seen.append(sum(map(len, texts))) or plain(texts))
    long = "x" * (50 * characters_per_token(chat.tokenizer) + 1)
    for read, body in (
        (reader.inputs, {"input": ["tree", long]}),
        (reader.inputs, {"messages": [{"role": "user", "content": long}, {"role": "assistant", "content": "x"}]}),
        (reader.pairs, {"text_1": long, "text_2": ["x"] * 1_000}),
    ):
        with pytest.raises(Refused, match=r"input \d has [\d,]+ characters, more than 50 tokens can have"):
            read(body)
    assert sum(seen) <= len("tree")


def test_large_requests_are_tokenized_in_pieces(tokenizer, monkeypatch):
    chat = Chat(tokenizer)
    reader, texts = Reader(chat, "tiny", vocabulary=1_000, max_length=0, most=1_000), [rendered("a tree " * 2_000)] * 20
    wanted, sizes, plain = chat.encode(texts), [], chat.encode
    monkeypatch.setattr(chat, "encode", lambda piece: sizes.append(sum(map(len, piece))) or plain(piece))
    assert reader.inputs({"input": texts}).sequences == wanted and max(sizes) <= 65_536 and len(sizes) >= 4


def test_what_a_request_renders_to_has_a_limit(tokenizer, monkeypatch):
    monkeypatch.setattr("rmjax.serve.inputs.MOST_RENDERED", 100_000)
    reader = Reader(Chat(tokenizer), "tiny", vocabulary=1_000, max_length=0, most=1_000)
    with pytest.raises(Refused, match="renders to more than 100,000 characters") as refused:
        reader.pairs({"text_1": "tree " * 200, "text_2": ["x"] * 1_000})
    assert refused.value.code == 413

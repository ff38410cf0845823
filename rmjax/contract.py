"""The score contract: a reward is only meaningful with its rendering, so an export says how it was made.

`reward_contract.json` holds the chat template's hash and arguments, the special ids, the rule for the scored token, the
rewards' mean and standard deviation on the validation set, the metrics, and golden rows: token ids with their float32
score, computed from the exported weights.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmjax.data.chat import Chat
from rmjax.data.trees import Tokens

FILE = "reward_contract.json"
RULE = (
    "the last token of apply_chat_template(conversation, tokenize=False, add_generation_prompt=False), tokenized "
    "without adding special tokens; nothing is trimmed"
)
TOLERANCE = 1e-4  # of golden scores, in float32


def template_hash(chat: Chat) -> str:
    """SHA-256 of the chat template's text."""
    return hashlib.sha256(str(chat.tokenizer.chat_template).encode()).hexdigest()


def make(
    chat: Chat, *, objective: str, metrics: Mapping[str, float], data: str, max_length: int, over_long: str
) -> dict:
    """The contract of a run, without golden rows.

    Args:
        chat: tokenizer and template of the run.
        objective: name of the objective.
        metrics: validation metrics of the exported step; `reward_mean` and `reward_std` among them.
        data: fingerprint of the training data.
        max_length: tokens of a conversation in training.
        over_long: what was done with longer ones.
    """
    tokenizer = chat.tokenizer
    return {
        "version": 1,
        "scored_token": RULE,
        "template_sha256": template_hash(chat),
        "template_kwargs": chat.template_kwargs,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "objective": objective,
        "reward_mean": metrics.get("validation/reward_mean"),
        "reward_std": metrics.get("validation/reward_std"),
        "max_length": max_length,
        "over_long": over_long,
        "data_fingerprint": data,
        "metrics": metrics,
        "golden": [],
    }


def golden_rows(chat: Chat, sequences: Sequence[Tokens], scores: Sequence[float]) -> list[dict[str, Any]]:
    """Rendered text, token ids and score of each sequence whose text tokenizes back to the same ids."""
    texts = [chat.tokenizer.decode(s, skip_special_tokens=False) for s in sequences]
    same = [list(map(int, a)) == list(map(int, b)) for a, b in zip(chat.encode(texts), sequences)] if texts else []
    rows = zip(texts, sequences, scores, same)
    return [{"text": t, "token_ids": list(map(int, s)), "score": float(x)} for t, s, x, ok in rows if ok]


def write(directory: Path, terms: dict[str, Any]) -> None:
    """Writes the contract into an export."""
    (directory / FILE).write_text(json.dumps(terms, indent=2, ensure_ascii=False) + "\n")


def read(directory: str | Path) -> dict[str, Any] | None:
    """The contract of an export; None for a directory without one."""
    path = Path(directory) / FILE
    return json.loads(path.read_text()) if path.exists() else None


def check(terms: dict[str, Any], chat: Chat) -> None:
    """Makes sure that this tokenizer renders and splits as the model was trained.

    Raises:
        ValueError: another rule for the scored token, another template, or other tokens for a golden text.
    """
    problems = []
    if terms["scored_token"] != RULE:
        problems.append(f"its scored token is {terms['scored_token']!r}, this version of rmjax scores {RULE!r}")
    if terms["template_sha256"] != template_hash(chat):
        problems.append("the tokenizer's chat template is not the one it was trained with")
    for number, row in enumerate(terms["golden"]):
        if list(chat.encode([row["text"]])[0]) != row["token_ids"]:
            problems.append(f"golden row {number} is split into other tokens than it was in training")
    if problems:
        raise ValueError(
            "the score contract does not hold, so scores would not mean what they did; take tokenizer and template "
            "from the same export:\n  " + "\n  ".join(problems)
        )


def check_scores(terms: dict[str, Any], scores: Sequence[float]) -> None:
    """Compares replayed float32 scores of the golden rows with the contract's.

    Raises:
        ValueError: one differs by more than TOLERANCE.
    """
    for number, (row, score) in enumerate(zip(terms["golden"], scores, strict=True)):
        if not abs(row["score"] - score) <= TOLERANCE:
            raise ValueError(
                f"golden row {number} scores {score:.6f} here and {row['score']:.6f} in its contract: the "
                f"weights or the code are not the ones that made this export"
            )

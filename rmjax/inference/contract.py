"""The score contract: a reward is only meaningful with its rendering, so an export says how it was made.

`reward_contract.json` holds the chat template's hash and arguments, the special ids, the rule for the scored token,
the rewards' mean and standard deviation on the validation set, the metrics, what the head's outputs mean (the objective
with what it learnt), the norm of every parameter, and golden rows: token ids, scored tokens and their float32 outputs,
from the exported weights.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np

from rmjax.batches.chat import PROBE, Chat
from rmjax.batches.trees import Tokens
from rmjax.models import hf
from rmjax.runtime import files, ownership

FILE, VERSION = "reward_contract.json", 2
RENDERING = (
    "apply_chat_template(conversation, tokenize=False, add_generation_prompt=False), tokenized without adding special "
    "tokens; nothing is trimmed"
)
RULES = {  # which tokens are scored, by architecture
    "SequenceClassification": f"the last token of {RENDERING}",
    "TokenClassification": f"the token with the last character of each step, in {RENDERING}",
    "CausalLM": "none: the model writes",
}
READ = {  # what replaying needs, beside the version
    **{"scored_token": str, "template_sha256": str, "template_kwargs": dict, "objective": dict},
    **{"objective_params": dict, "golden": list},
}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
NORMS = 1e-3  # of the norms of parameters, relative
TOLERANCE = 1e-4  # of golden scores, in float32


def template_hash(chat: Chat) -> str:
    """SHA-256 of the chat template's text."""
    return hashlib.sha256(str(chat.tokenizer.chat_template).encode()).hexdigest()


def make(
    chat: Chat,
    *,
    objective: Mapping[str, Any],
    architecture: str,
    decoding: str,
    own: Mapping[str, Any],
    labels: Sequence[str],
    metrics: Mapping[str, float],
    data: str,
    max_length: int,
    over_long: str,
    estimates: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contract of a run, without golden rows.

    Args:
        chat: tokenizer and template of the run.
        objective: name and keys of the objective, which say how its outputs are decoded.
        architecture: of the export, a name in RULES.
        decoding: how scores are had from the head's outputs, in words.
        own: what the objective itself learnt (a tie parameter, cut points).
        metrics: validation metrics of the exported step; `reward_mean` and `reward_std` among them.
        max_length: tokens of a conversation in training.
        estimates: metrics with 95 % intervals, {"validation/accuracy": {"value", "low", "high"}}.
    """
    tokenizer = chat.tokenizer
    return {
        "version": VERSION,
        "scored_token": RULES[architecture],
        "template_sha256": template_hash(chat),
        "template_kwargs": chat.template_kwargs,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "objective": dict(objective),
        "objective_params": {name: np.asarray(value).tolist() for name, value in own.items()},
        "labels": list(labels),
        "decoding": decoding,
        "reward_mean": metrics.get("validation/reward_mean"),
        "reward_std": metrics.get("validation/reward_std"),
        "max_length": max_length,
        "over_long": over_long,
        "data_fingerprint": data,
        "metrics": metrics,
        "estimates": dict(estimates or {}),
        "golden": [],
    }


def base_kept_as(terms: Mapping[str, Any] | None) -> str:
    """How the base of an adapter was kept while that was trained ("nf4"); "" of what is no adapter's contract."""
    return str((terms or {}).get("base", {}).get("kept_as", ""))


def golden_rows(chat: Chat, sequences: Sequence[tuple[Tokens, Sequence[int]]]) -> list[dict[str, Any]]:
    """Rendered text, token ids and scored tokens of a made-up conversation and of these sequences, without outputs.

    The text of a sequence is decoded from its tokens; it is None where it tokenizes to others (some decoders drop
    spaces, and normalizers change characters).
    """
    probe = chat.render(PROBE)
    tokens = chat.encode([probe])[0]
    rows: list[dict[str, Any]] = [{"text": probe, "token_ids": tokens, "at": [len(tokens) - 1]}]
    for sequence, at in sequences:
        ids = list(map(int, sequence))
        text = chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        same = chat.encode([text])[0] == ids
        rows.append({"text": text if same else None, "token_ids": ids, "at": list(map(int, at))})
    return rows


def write(directory: Path, terms: Mapping[str, Any]) -> None:
    """Writes the contract into an export, whole."""
    files.write_whole(directory / FILE, json.dumps(terms, indent=2, ensure_ascii=False) + "\n")
    ownership.note_change(directory, FILE)


def read(directory: str | Path) -> dict[str, Any] | None:
    """The contract of an export; None for a directory without one.

    Raises:
        ValueError: it is no JSON, or of another version.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return None
    try:
        terms = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it from the export again") from None
    if not isinstance(terms, dict) or terms.get("version") != VERSION:
        found = terms.get("version") if isinstance(terms, dict) else type(terms).__name__
        raise ValueError(f"{path} is of version {found!r}, this rmjax reads {VERSION}; use the rmjax that wrote it")
    wrong = [name for name, kind in READ.items() if not isinstance(terms.get(name), kind)]
    wrong += [f"golden[{i}]" for i, row in enumerate(terms.get("golden") or ()) if not _is_golden(row)]
    if wrong:
        raise ValueError(f"{path} lacks {', '.join(wrong)}, or has it wrong; copy it from the export again")
    return terms


def _is_golden(row: Any) -> bool:
    whole = lambda x: isinstance(x, list) and bool(x) and all(type(n) is int and n >= 0 for n in x)
    if not isinstance(row, dict) or not (whole(row.get("token_ids")) and whole(row.get("at"))) or "text" not in row:
        return False
    return isinstance(row["text"], str | None) and max(row["at"]) < len(row["token_ids"])


def normalization(terms: Mapping[str, Any] | None) -> tuple[float, float]:
    """Mean and standard deviation of the rewards on the validation set: a reward minus the one, divided by the other.

    Raises:
        ValueError: there is no contract, or it has no reward statistics (a judge's has none).
    """
    mean, std = (terms or {}).get("reward_mean"), (terms or {}).get("reward_std")
    if mean is None or not std:
        what = "no score contract" if terms is None else f"a score contract with reward_mean {mean}, reward_std {std}"
        raise ValueError(f"rewards cannot be normalized: the model has {what}; leave out --normalize")
    return float(mean), float(std)


def find(path_or_id: str | Path) -> dict[str, Any] | None:
    """The contract of a directory or hub id, without the weights; None where there is none or it cannot be had.

    Raises:
        ValueError: as `read`.
    """
    if Path(path_or_id).is_dir():
        return read(path_or_id)
    if not hf.is_hub_id(path_or_id):
        return None
    try:
        return read(Path(huggingface_hub.hf_hub_download(str(path_or_id), FILE)).parent)
    except Exception:  # of the hub, or of the network
        return None  # loading the model says what is wrong


def template_kwargs(terms: dict[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The contract's template arguments, which `given` may repeat but not change.

    Raises:
        ValueError: others were given.
    """
    agreed = terms["template_kwargs"]
    if given is not None and dict(given) != agreed:
        raise ValueError(
            f"template_kwargs {json.dumps(dict(given))} differ from the score contract's {json.dumps(agreed)}, with "
            "which the model was trained; leave them out"
        )
    return agreed


def check(terms: dict[str, Any], chat: Chat, values: Mapping[str, Any]) -> None:
    """Makes sure that this tokenizer renders and splits as the model was trained, and that padding is still told apart.

    Args:
        chat: tokenizer and template of the directory.
        values: its config.json, by whose pad token transformers finds the scored token.

    Raises:
        ValueError: another rule for the scored token, another template, other special tokens, or other tokens for a
            golden text.
    """
    problems = []
    if terms["scored_token"] not in RULES.values():
        known = "; ".join(RULES.values())
        problems.append(f"its scored token is {terms['scored_token']!r}, this version of rmjax scores {known}")
    if terms["template_sha256"] != template_hash(chat):
        problems.append("the tokenizer's chat template is not the one it was trained with")
    for name in SPECIAL:
        if terms.get(name) != (found := getattr(chat.tokenizer, name)):
            problems.append(f"the tokenizer's {name} is {found}, it was {terms.get(name)} in training")
    pad, found = terms.get("pad_token_id"), values.get("pad_token_id")
    if pad != found:
        problems.append(
            f"config.json has pad_token_id {found}, it was {pad} in training: transformers scores the last other token"
        )
    for number, row in enumerate(terms["golden"]):
        if row["text"] is not None and chat.encode([row["text"]])[0] != row["token_ids"]:
            problems.append(f"golden row {number} is split into other tokens than it was in training")
    if problems:
        raise ValueError(
            "the score contract does not hold, so scores would not mean what they did; take tokenizer and template "
            "from the same export:\n  " + "\n  ".join(problems)
        )


def check_weights(terms: Mapping[str, Any], norms: Mapping[str, Sequence[float]]) -> None:
    """Compares the norms of the parameters with the contract's: golden rows are few, and see little of some weights.

    Args:
        terms: the contract; one of before there were norms passes.
        norms: of the parameters as they were loaded, see RewardModel.norms.

    Raises:
        ValueError: one differs by more than NORMS of itself, or is missing; names it.
    """
    agreed = terms.get("weight_norms")
    if agreed is None:
        return
    for name in sorted(agreed.keys() | norms.keys()):
        there, here = (np.array(x.get(name, ()), np.float64) for x in (agreed, norms))
        if there.shape != here.shape or not np.allclose(there, here, rtol=NORMS, atol=1e-12):
            raise ValueError(
                f"the parameter {name} has another norm than in the score contract: the weights are not the ones that "
                "this export was made with"
            )


def check_outputs(terms: dict[str, Any], outputs: Sequence[np.ndarray]) -> None:
    """Compares replayed float32 outputs of the golden rows with the contract's.

    Args:
        outputs: [scored tokens, A] for each golden row.

    Raises:
        ValueError: one differs by more than TOLERANCE.
    """
    for number, (row, found) in enumerate(zip(terms["golden"], outputs, strict=True)):
        agreed = np.array(row["outputs"], np.float64)
        if agreed.shape != found.shape or not np.abs(agreed - found).max() <= TOLERANCE:
            here, there = (" ".join(f"{x:.6f}" for x in np.ravel(values)[:4]) for values in (found, agreed))
            raise ValueError(
                f"golden row {number} scores {here} here and {there} in its contract: the weights or the code are "
                "not the ones that made this export"
            )

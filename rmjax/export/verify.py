"""Replays the golden rows of an export's score contract by others: transformers, and vLLM where it is installed."""

import contextlib
import datetime
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmjax.inference import contract
from rmjax.inference.reward_model import RewardModel
from rmjax.models import hf

Outputs = list[np.ndarray]  # of each golden row [scored tokens, A]


def verify(directory: Path) -> list[str]:
    """Replays the contract by every means that is here, and writes into it that they agree.

    Returns:
        What a person reads: each golden row with its first output by each, and the largest difference.

    Raises:
        ValueError: no contract, or a disagreement; says which row. Nothing is written then. Or no transformers to
            replay with (`rmjax[verify]`).
    """
    terms = contract.read(directory)
    if terms is None:
        raise ValueError(f"{directory} has no {contract.FILE}: it is no export of ours; --verify has nothing to replay")
    if importlib.util.find_spec("torch") is None:
        raise ValueError("--verify replays through transformers, which needs torch: pip install 'rmjax[verify]'")
    model = RewardModel.load(directory, dtype="float32")
    contract.check_weights(terms, model.norms())
    ours = model.replay(terms["golden"])
    contract.check_outputs(terms, ours)
    found: dict[str, Outputs] = {"rmjax": ours}
    for name, replay in by(model.architecture).items():
        found[name] = replay(directory, terms["golden"])
        try:
            contract.check_outputs(terms, found[name])
        except ValueError as error:
            raise ValueError(f"{name} disagrees with the export's contract: {error}") from None
    today = datetime.date.today().isoformat()
    agreed = [np.array(row["outputs"], np.float64) for row in terms["golden"]]
    apart = {name: [float(np.abs(a - b).max()) for a, b in zip(x, agreed)] for name, x in found.items()}
    terms["verified"] = [{"by": name, "date": today, "largest_difference": max(apart[name])} for name in found]
    contract.write(directory, terms)
    return _table(found, apart)


def by(architecture: str) -> dict[str, Callable[[Path, Sequence[Any]], Outputs]]:
    """The means that are here, by name and version; vLLM is asked about sequence classifiers only."""
    import transformers

    found: dict[str, Callable[[Path, Sequence[Any]], Outputs]] = {
        f"transformers {transformers.__version__}": with_transformers
    }
    if architecture == "SequenceClassification" and importlib.util.find_spec("vllm") is not None:
        import vllm

        found[f"vllm {vllm.__version__}"] = with_vllm
    return found


def with_transformers(directory: Path, golden: Sequence[Any]) -> Outputs:
    """Outputs of the golden rows by the class of transformers that config.json names, in float32, one row at a time."""
    import torch
    import transformers

    architecture = str(hf.read_config(directory)["architectures"][0]).rpartition("For")[2]
    kind = getattr(transformers, f"AutoModelFor{architecture}")
    with _quiet(transformers):
        model = kind.from_pretrained(str(directory), dtype=torch.float32).train(False)
    found = []
    for row in golden:
        ids = torch.tensor([row["token_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0].double()
        if architecture == "CausalLM":  # the mean negative log-likelihood of the tokens after the first
            likely = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])
            found.append(-likely[: row["at"][-1]].mean().numpy().reshape(1, 1))
        else:
            found.append((logits[row["at"]] if architecture == "TokenClassification" else logits[None]).numpy())
    return found


def with_vllm(directory: Path, golden: Sequence[Any]) -> Outputs:
    """Outputs of the golden rows by vLLM's offline pooling, in float32, without any activation.

    Source: vLLM's documentation of pooling models. Of sequence classifiers only: what else is exported it serves in
    other ways.
    """
    import vllm

    model = vllm.LLM(model=str(directory), runner="pooling", dtype="float32", enforce_eager=True)
    params = vllm.PoolingParams(use_activation=False)
    prompts = [{"prompt_token_ids": row["token_ids"]} for row in golden]
    outputs = model.encode(prompts, pooling_params=params, pooling_task="classify")
    return [np.asarray(output.outputs.data, np.float64).reshape(1, -1) for output in outputs]


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars of loading weights."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.enable_progress_bar()


def _table(found: dict[str, Outputs], apart: dict[str, list[float]]) -> list[str]:
    names = list(found)
    width = [max(12, len(name)) for name in names]
    lines = ["golden row  " + "  ".join(f"{name:>{w}}" for name, w in zip(names, width)) + "  largest difference"]
    for row in range(len(found[names[0]])):
        first = [f"{float(np.ravel(found[name][row])[0]):>{w}.6f}" for name, w in zip(names, width)]
        lines.append(f"{row:10d}  " + "  ".join(first) + f"  {max(x[row] for x in apart.values()):18.1e}")
    worst = max(max(x) for x in apart.values())
    return [*lines, f"all agree with the contract; largest difference {worst:.1e}, allowed is {contract.TOLERANCE:g}"]

"""Replays the golden rows of an export's score contract by others: transformers, and vLLM where it is installed."""

import datetime
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmjax.export import vllm_replay
from rmjax.inference import contract
from rmjax.inference.reward_model import RewardModel
from rmjax.models import hf, peft, quantized
from rmjax.runtime import notes
from rmjax.suggestions import install

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
        raise ValueError(f"--verify replays through transformers, which needs torch: {install('verify')}")
    architecture = str(hf.read_config(directory)["architectures"][0]).rpartition("For")[2]
    # The others first: on a GPU JAX takes most of the memory as soon as it begins.
    replays = other_replays(architecture, directory, contract.base_kept_as(terms))
    others = {name: replay(directory, terms["golden"]) for name, replay in replays.items()}
    model = RewardModel.load(directory, dtype="float32")
    contract.check_weights(terms, model.norms())
    outputs: dict[str, Outputs] = {"rmjax": model.replay(terms["golden"]), **others}
    contract.check_outputs(terms, outputs["rmjax"])
    for name in others:
        try:
            contract.check_outputs(terms, outputs[name])
        except ValueError as error:
            raise ValueError(f"{name} disagrees with the export's contract: {error}") from None
    today = datetime.date.today().isoformat()
    agreed = [np.array(row["outputs"], np.float64) for row in terms["golden"]]
    differences = {name: [float(np.abs(a - b).max()) for a, b in zip(x, agreed)] for name, x in outputs.items()}
    terms["verified"] = [{"by": name, "date": today, "largest_difference": max(x)} for name, x in differences.items()]
    contract.write(directory, terms)
    return _table(outputs, differences)


def other_replays(
    architecture: str, directory: Path, base_kept_as: str = ""
) -> dict[str, Callable[[Path, Sequence[Any]], Outputs]]:
    """What else can replay here, by name and version; vLLM is asked about sequence classifiers only.

    Adapters are replayed by PEFT. Of a base that is kept in 4 or 8 bits they are not: transformers would read it whole,
    so its outputs are others.

    Raises:
        ValueError: an adapter, and no PEFT.
    """
    if peft.is_adapter(directory):
        if base_kept_as in quantized.BASES:
            notes.tell(f"the adapter was trained on a base in {base_kept_as}: only rmjax reads it so, and replays it")
            return {}
        if importlib.util.find_spec("peft") is None:
            raise ValueError(f"--verify replays adapters through PEFT: {install('verify')}")
        return {f"peft {version_of('peft')}": _by_transformers}
    names = ["transformers"]
    if architecture == "SequenceClassification" and importlib.util.find_spec("vllm") is not None:
        names.append("vllm")
    replays = {"transformers": _by_transformers, "vllm": _by_vllm}
    return {f"{name} {version_of(name)}": replays[name] for name in names}


def version_of(package: str) -> str:
    """Of what is installed; vLLM's distributions have another name for every kind of device."""
    names = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(names[0])


def _by_transformers(directory: Path, golden: Sequence[Any]) -> Outputs:
    """Outputs of the golden rows by the class of transformers that config.json names, in float32, one row at a time."""
    import torch
    import transformers

    values = hf.read_config(directory)
    architecture = str(values["architectures"][0]).rpartition("For")[2]
    kind = getattr(transformers, f"AutoModelFor{architecture}")
    transformers.utils.logging.disable_progress_bar()
    try:
        if peft.is_adapter(directory):
            from peft import PeftModel

            # A base may have a head of other labels, which the adapter's takes the place of.
            head = (
                {"num_labels": values["num_labels"], "ignore_mismatched_sizes": True} if "num_labels" in values else {}
            )
            base = kind.from_pretrained(str(hf.base_of(directory)), dtype=torch.float32, **head)
            base.config.pad_token_id = (contract.read(directory) or {}).get("pad_token_id")
            model = PeftModel.from_pretrained(base, str(directory)).train(False)
        else:
            model = kind.from_pretrained(str(directory), dtype=torch.float32).train(False)
    finally:
        transformers.utils.logging.enable_progress_bar()
    outputs = []
    for row in golden:
        ids = torch.tensor([row["token_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        if architecture == "CausalLM":  # the mean negative log-likelihood of the tokens after the first
            likely = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])
            outputs.append(-likely[: row["at"][-1]].mean().numpy().reshape(1, 1))
        else:
            outputs.append((logits[row["at"]] if architecture == "TokenClassification" else logits[None]).numpy())
    return outputs


def _by_vllm(directory: Path, golden: Sequence[Any]) -> Outputs:
    """Of sequence classifiers only: what else is exported vLLM serves in other ways."""
    return vllm_replay.replay(directory, [row["token_ids"] for row in golden])


def _table(outputs: dict[str, Outputs], differences: dict[str, list[float]]) -> list[str]:
    width = {name: max(12, len(name)) for name in outputs}
    lines = ["golden row  " + "  ".join(f"{name:>{w}}" for name, w in width.items()) + "  largest difference"]
    for row, largest in enumerate(map(max, zip(*differences.values()))):
        first = [f"{float(np.ravel(outputs[name][row])[0]):>{w}.6f}" for name, w in width.items()]
        lines.append(f"{row:10d}  " + "  ".join(first) + f"  {largest:18.1e}")
    worst = max(map(max, differences.values()))
    return [*lines, f"all agree with the contract; largest difference {worst:.1e}, allowed is {contract.TOLERANCE:g}"]

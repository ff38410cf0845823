r"""Scoring eight responses to each prompt: rmjax beside transformers on a CPU, in alternating rounds.

    python -m venv peer && peer/bin/pip install 'torch==2.13.0' transformers
    python benchmarks/scoring.py --peer-python=peer/bin/python

The model is that of trl_cpu.py: a Qwen2 reward model of 4 layers with random weights, in float32. Prompts and responses
are random tokens of drawn lengths: `short`, 150 prompts of 160 and responses of 63 tokens on average, and `long`, 40
prompts of 985 and responses of 58. transformers scores conversations sorted by length in padded batches, of the size
among --batches that was fastest in a round before the first; `RewardModel.outputs` scores trees, in rows and batches of
its own choice. First all scores are compared: where two differ by more than 1e-4 it ends. A round is one pass over all
conversations after one that is not counted (it compiles), each side in a process of its own.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trl_cpu  # beside this file

TOLERANCE = 1e-4
RESPONSES = 8
# Prompts, and mean tokens of a prompt and of a response. Lengths are log-normal around them.
JOBS = {"short": (150, 160, 63), "long": (40, 985, 58)}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="the Python of an environment that has torch and transformers")
    parser.add_argument("--jobs", default=",".join(JOBS), help="which, with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="8,16,32,64", help="conversations of a batch of transformers, to try")
    parser.add_argument("--host-devices", type=int, default=1, help="ours: devices that JAX makes of the CPU")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if not given.job and not given.peer_python:
        parser.error("--peer-python is missing: the Python of an environment that has torch and transformers")
    return given


def conversations(name: str, vocabulary: int) -> list[tuple[list[int], list[list[int]]]]:
    """Random tokens of each prompt, and of its responses."""
    import numpy as np

    count, prompt, response = JOBS[name]
    rng = np.random.default_rng(0)
    length = lambda mean, spread: int(np.clip(rng.lognormal(np.log(mean) - spread**2 / 2, spread), 4, 2000))
    draw = lambda n: rng.integers(0, vocabulary, n).tolist()
    return [(draw(length(prompt, 0.5)), [draw(length(response, 0.6)) for _ in range(RESPONSES)]) for _ in range(count)]


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Our side: scores everything twice.

    Returns:
        seconds of the second pass, scores, and the tokens that were computed and those of all conversations.
    """
    from rmjax.inference.reward_model import RewardModel

    model = RewardModel.load(job["model"], dtype="float32")
    whole = [prompt + response for prompt, responses in job["conversations"] for response in responses]
    model.outputs(whole)
    before, begin = model.inference.work.computed, time.perf_counter()
    scores = model.outputs(whole)[:, 0].tolist()
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "scores": scores,
        "computed": model.inference.work.computed - before,
        "tokens": sum(map(len, whole)),
    }


def check(peer: list[float], ours: list[float]) -> float:
    """The largest difference of two scores; ValueError where it exceeds TOLERANCE or there are more of one side."""
    if len(peer) != len(ours):
        raise ValueError(f"transformers gave {len(peer)} scores and we {len(ours)}")
    worst = max(abs(a - b) for a, b in zip(peer, ours))
    if not worst <= TOLERANCE:  # NaN is not
        raise ValueError(
            f"scores differ by {worst:g}, expected {TOLERANCE:g} at most: the two sides do not do the same"
        )
    return worst


def compare(name: str, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Checks and measures one job; prints as it goes."""
    job = {
        "do": "score",
        "model": str(scratch / "model"),
        "conversations": conversations(name, trl_cpu.SHAPE["pad_token_id"]),
        "ours": {"host_devices": given.host_devices},
    }
    commands = {
        "peer": [given.peer_python, str(Path(__file__).with_name("trl_side.py"))],
        "ours": [sys.executable, __file__, "--job"],
    }
    run = lambda side, **more: trl_cpu.run(commands[side], {**job, **more}, scratch)
    tried = {batch: run("peer", batch=batch) for batch in map(int, given.batches.split(","))}
    best = min(tried, key=lambda batch: tried[batch]["seconds"])
    first = run("ours")
    print(f"{name}: {len(first['scores']):,} conversations of {first['tokens']:,} tokens, ", end="")
    print(f"{first['computed']:,} of them computed; transformers in batches of {best}")
    print(f"  largest difference of scores: {check(tried[best]['scores'], first['scores']):.1e}", flush=True)
    seconds: dict[str, list[float]] = {"peer": [], "ours": []}
    for number in range(given.rounds):
        for side, more in (("peer", {"batch": best}), ("ours", {})):
            seconds[side].append(run(side, **more)["seconds"])
        print(f"  round {number + 1}: {seconds['peer'][-1]:.2f} s and {seconds['ours'][-1]:.2f} s", flush=True)
    ratios = [a / b for a, b in zip(seconds["peer"], seconds["ours"])]
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    print(
        f"  median {medians['peer']:.2f} s and {medians['ours']:.2f} s: "
        f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    return {
        "batch": best,
        "seconds": seconds,
        "ratios": ratios,
        "computed": first["computed"],
        "tokens": first["tokens"],
    }


def main() -> None:
    """Compares; or, in a process of its own, does our side of a job."""
    given = arguments()
    if given.job:
        print(json.dumps(score(json.loads(given.job.read_text()))))
        return
    try:
        with tempfile.TemporaryDirectory() as scratch:
            side = [given.peer_python, str(Path(__file__).with_name("trl_side.py"))]
            made = {"do": "make", "model": str(Path(scratch) / "model"), "shape": trl_cpu.SHAPE}
            trl_cpu.run(side, made, Path(scratch))
            figures = {name: compare(name, given, Path(scratch)) for name in given.jobs.split(",")}
    except ValueError as error:
        sys.exit(f"error: {error}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

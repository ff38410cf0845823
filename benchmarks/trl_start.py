r"""What stands before training, against TRL on the same cores: tokenizing, and the time to the end of the first step.

    python -m venv ours && ours/bin/pip install .
    python -m venv trl && trl/bin/pip install 'torch==2.13.0' 'trl==1.16.*'
    ours/bin/python benchmarks/trl_start.py tokenize --trl-python=trl/bin/python --tokenizer=DIRECTORY --pairs=100000
    ours/bin/python benchmarks/trl_start.py start --trl-python=trl/bin/python --tokenizer=DIRECTORY

The Python that runs this is ours; one without torch is what an installation without extras gives. The pairs are
conversations of random words of the tokenizer, as JSON lines, with the `--lengths` that come with the package.

tokenize    from the file to tokens on the disk, with nothing kept: `token_cache.build` here, `load_dataset` and the
            RewardTrainer's own preparation of a data set there (`datasets.map` with a process for each core, no limit
            of length). Each round compares the token ids of every 20th pair, chosen and rejected.
start       from the command to the end of the first optimizer step of 32 pairs, with what a first start kept:
            compiled programs and tokens here, the data set and its map there. A Qwen2 reward model of 4 layers of width
            256, made by transformers, float32; the tokenizer has to be one that goes with Qwen2. First one step on the
            same 32 pairs has to give the same loss to 1e-4 on both sides.

The sides take turns, each in a process of its own. wall_s is the whole command, cpu_s the CPU time of all its
processes (with the comparison of ids), which tells more where the machine has other work; work_s of `tokenize` leaves
out imports and loading the tokenizer.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MEASURED = {"tokenize": ("work_s", "wall_s", "cpu_s"), "start": ("wall_s", "cpu_s")}
PAIRS_PER_STEP, CHECKED, TOLERANCE = 32, 20, 1e-4
OPTIM = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("tokenize", "start", "ours"), help="`ours` is internal")
    parser.add_argument("--trl-python", help="the Python of an environment that has TRL")
    parser.add_argument("--tokenizer", help="directory of a tokenizer with a chat template")
    parser.add_argument("--lengths", default="hh", help="a file of lengths (batches/random_groups.py)")
    parser.add_argument("--pairs", type=int, default=2000, help="pairs of the file; default 2,000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workdir", type=Path, default=Path("runs/trl_start"), help="where pairs and figures go")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job != "ours" and not (given.trl_python and given.tokenizer):
        parser.error("--trl-python and --tokenizer are needed")
    return given


# ----------------------------------------------------------------------------------------------------
# Pairs, and what both sides are told
# ----------------------------------------------------------------------------------------------------


def write_pairs(path: Path, tokenizer: str, lengths: str, n: int) -> None:
    """`n` pairs of conversations of random words."""
    from tokenizing import make_pairs

    from rmjax.batches import chat
    from rmjax.batches.random_groups import read_lengths

    texts = path.with_suffix(".texts")
    make_pairs(texts, chat.Chat(chat.load_tokenizer(tokenizer)), read_lengths(lengths).tolist(), n)
    turn = lambda role, content: [{"role": role, "content": content}]
    with open(texts) as rows, open(path, "w") as file:
        for row in map(json.loads, rows):
            sides = {side: turn("assistant", row[side]) for side in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": turn("user", row["prompt"]), **sides}) + "\n")
    texts.unlink()


def digest(pairs: Any) -> str:
    """SHA-256 of token ids, [chosen, rejected] of each pair."""
    text = json.dumps([[list(map(int, ids)) for ids in pair] for pair in pairs])
    return hashlib.sha256(text.encode()).hexdigest()


def environment(workdir: Path) -> dict[str, str]:
    """Of both sides: caches below the workdir, no network."""
    caches = {
        "XDG_CACHE_HOME": workdir / "cache",
        "HF_HOME": workdir / "hf",
        "HF_DATASETS_CACHE": workdir / "hf" / "data",
    }
    more = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
    kept = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    return {**kept, **{key: str(path) for key, path in caches.items()}, **more}


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(command: list[str], task: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """Does a task in a process of its own, which prints its answer; adds the seconds of the whole process."""
    path = workdir / "task.json"
    path.write_text(json.dumps(task))
    begin, cpu = time.perf_counter(), cpu_seconds()
    done = subprocess.run([*command, str(path)], stdout=subprocess.PIPE, text=True, env=environment(workdir))
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with status {done.returncode}; what it said is above")
    answer = json.loads(done.stdout.splitlines()[-1])
    wall = time.perf_counter() - begin - answer.get("after_s", 0.0)
    return {**answer, "wall_s": wall, "cpu_s": cpu_seconds() - cpu}


# ----------------------------------------------------------------------------------------------------
# Tokenizing
# ----------------------------------------------------------------------------------------------------


def tokenize_ours(task: dict[str, Any]) -> dict[str, Any]:
    """Our side; the seconds of `token_cache.build`, and what the ids of some pairs are."""
    from rmjax.batches import chat, tasks, token_cache

    speaker = chat.Chat(chat.load_tokenizer(task["tokenizer"]))
    begin = time.perf_counter()
    groups = token_cache.build(task["pairs"], speaker, tasks.Preferences(), cache_dir=task["ours"])
    end = time.perf_counter()
    ids = digest(groups.group(i).tree.sequences() for i in range(0, len(groups), CHECKED))
    return {"work_s": end - begin, "pairs": len(groups), "ids": ids, "after_s": time.perf_counter() - end}


def compare_tokenizing(
    given: argparse.Namespace, workdir: Path, commands: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Rounds of both sides; the token ids have to be the same."""
    task = {"do": "tokenize", "tokenizer": given.tokenizer, "pairs": str(workdir / "pairs.jsonl"), "checked": CHECKED}
    task |= {"ours": str(workdir / "tokens"), "cores": len(os.sched_getaffinity(0))}
    rounds = []
    for number in range(given.rounds):
        for scratch in (workdir / "tokens", workdir / "hf", workdir / "cache"):
            shutil.rmtree(scratch, ignore_errors=True)
        found = {side: run(command, task, workdir) for side, command in commands.items()}
        if len({(side["ids"], side["pairs"]) for side in found.values()}) > 1:
            raise ValueError(f"the token ids differ, or the number of pairs: {found}")
        rounds.append(found)
        say(number, found, MEASURED["tokenize"])
    return rounds


# ----------------------------------------------------------------------------------------------------
# Starting
# ----------------------------------------------------------------------------------------------------


def start_command(task: dict[str, Any], run_dir: Path) -> list[str]:
    """Our training run."""
    optim = task["optim"]
    keys = {
        "model.init_from": task["model"],
        "model.tokenizer": task["tokenizer"],
        "data.train": task["pairs"],
        "data.validation": task["validation"],
        "duration": f"{task['steps']} steps",
        "eval.train_groups": 0,
        "plan.row_tokens": 1280,
        "plan.rows_per_step": 0,
        "plan.groups_per_step": PAIRS_PER_STEP,
        "log.tensorboard": False,
        "log.report": False,
        "log.every": "1 steps",
        **{f"optim.{key}": optim[key] for key in optim},
        "optim.schedule": "constant",
        "optim.warmup": "0 steps",
    }
    options = [f"--config.{key}={value}" for key, value in keys.items()]
    config = str(HERE.parent / "configs" / "bt_qwen0_5b.py")
    return [sys.executable, "-m", "rmjax.main", f"--config={config}", f"--workdir={run_dir}", *options]


def first_step_of(command: list[str], pattern: str, workdir: Path) -> dict[str, float]:
    """Seconds from the command to the line that says that its first step is done; then it is ended."""
    begin, cpu, said, seconds = time.perf_counter(), cpu_seconds(), [], 0.0
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    with subprocess.Popen(command, text=True, cwd=HERE.parent, env=environment(workdir), **pipes) as process:
        for line in process.stdout or ():
            said.append(line)
            if re.match(pattern, line):
                seconds = time.perf_counter() - begin
                os.killpg(process.pid, signal.SIGKILL)  # what follows is not measured
                break
    if seconds:
        return {"wall_s": seconds, "cpu_s": cpu_seconds() - cpu}
    raise ValueError("the run ended before its first step:\n" + "".join(said[-30:]))


def first_losses(task: dict[str, Any], workdir: Path, commands: dict[str, list[str]]) -> dict[str, float]:
    """The loss of one step on the same 32 pairs, of both sides; ValueError where they differ."""
    rows = Path(task["pairs"]).read_text().splitlines(keepends=True)
    few = workdir / "few.jsonl"
    few.write_text("".join(rows[:PAIRS_PER_STEP]))
    small, trained = {**task, "pairs": str(few), "steps": 1}, workdir / "checked"
    shutil.rmtree(trained, ignore_errors=True)
    subprocess.run(
        start_command(small, trained), check=True, cwd=HERE.parent, env=environment(workdir), stdout=subprocess.DEVNULL
    )
    lines = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    ours = next(line["train/loss"] for line in lines if "train/loss" in line)
    losses = {"trl": run(commands["trl"], {**small}, workdir)["loss"], "ours": ours}
    print(f"loss of one step on the same {PAIRS_PER_STEP} pairs: {losses}", flush=True)
    if not abs(losses["trl"] - losses["ours"]) <= TOLERANCE:  # NaN is not
        raise ValueError(f"the first losses differ by more than {TOLERANCE:g}: the sides do not train the same")
    return losses


def compare_starts(given: argparse.Namespace, workdir: Path, commands: dict[str, list[str]]) -> list[dict[str, Any]]:
    """One start of each side that is not measured, then rounds."""
    task = {"do": "start", "tokenizer": given.tokenizer, "model": str(workdir / "model"), "optim": OPTIM, "steps": 20}
    task |= {"pairs": str(workdir / "pairs.jsonl"), "validation": str(workdir / "validation.jsonl")}
    task |= {"scratch": str(workdir / "trl"), "cores": len(os.sched_getaffinity(0)), "per_step": PAIRS_PER_STEP}
    rows = (workdir / "pairs.jsonl").read_text().splitlines(keepends=True)
    (workdir / "validation.jsonl").write_text("".join(rows[:8]))
    (workdir / "pairs.jsonl").write_text("".join(rows[8:]))
    run(commands["trl"], {**task, "do": "make"}, workdir)
    first_losses(task, workdir, commands)
    rounds = []
    for number in range(-1, given.rounds):
        path = workdir / "task.json"
        path.write_text(json.dumps(task))
        shutil.rmtree(workdir / "ours", ignore_errors=True)
        found = {
            "trl": first_step_of([*commands["trl"], str(path)], "step 1 done", workdir),
            "ours": first_step_of(start_command(task, workdir / "ours"), r"step 1[ /]", workdir),
        }
        say(number, found, MEASURED["start"])
        rounds += [found] * (number >= 0)
    return rounds


# ----------------------------------------------------------------------------------------------------
# Both
# ----------------------------------------------------------------------------------------------------


def say(number: int, found: dict[str, dict[str, Any]], names: tuple[str, ...]) -> None:
    """A round in a line."""
    parts = [
        f"{name}: TRL {found['trl'][name]:.2f}, ours {found['ours'][name]:.2f}, times "
        f"{found['trl'][name] / found['ours'][name]:.2f}"
        for name in names
    ]
    print(f"{f'round {number + 1}' if number >= 0 else 'not counted'}: {'; '.join(parts)}", flush=True)


def summary(rounds: list[dict[str, Any]], name: str) -> str:
    """Medians, and the median and range of the ratios."""
    seconds = {side: [one[side][name] for one in rounds] for side in ("trl", "ours")}
    ratios = [a / b for a, b in zip(seconds["trl"], seconds["ours"])]
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return (
        f"{name}, medians: TRL {medians['trl']:.2f}, ours {medians['ours']:.2f}; times {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


def main() -> None:
    """Compares; or, in a process of its own, does our side of a task."""
    given = arguments()
    if given.job == "ours":
        print(json.dumps(tokenize_ours(json.loads(given.task.read_text()))))
        return
    workdir = given.workdir.expanduser().absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    commands = {
        "trl": [given.trl_python, str(HERE / "trl_start_side.py")],
        "ours": [sys.executable, str(Path(__file__).resolve()), "ours", "--task"],
    }
    write_pairs(workdir / "pairs.jsonl", given.tokenizer, given.lengths, given.pairs)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "transformers", "tokenizers")}
    print(f"{given.pairs:,} pairs, {len(os.sched_getaffinity(0))} cores, ours: {versions}", flush=True)
    compare = {"tokenize": compare_tokenizing, "start": compare_starts}[given.job]
    try:
        rounds = compare(given, workdir, commands)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name in MEASURED[given.job]:
        print(summary(rounds, name))
    (workdir / f"{given.job}.json").write_text(json.dumps(rounds, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Measures what stands before training: tokenizing pairs, starting again from the cache, and reading the batches.

    python benchmarks/tokenizing.py --tokenizer=DIRECTORY --lengths=lengths_long.json --workdir=runs/tokenizing

Makes `--pairs` pairs of random words whose tokens (prompt, chosen, rejected, with what the template puts around them)
follow the triples of a JSON file, then runs three stages, each in a process of its own:

    first   tokenizes them into an empty cache
    second  does what a run does before its first step: imports, tokenizer, cache, audit, plan
    read    the same, then fills every batch of an epoch, as training does, without a model

Prints a line for each, and writes all figures to WORKDIR/tokenizing.json. Wall time is the stage's whole process, its
start included. Memory is the largest resident set of the process and, for tokenizing, of its largest worker; pages of
the memory-mapped cache count. On a machine that does other things too, compare CPU time.
"""

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from peaks import Memory

FLAGS = flags.FLAGS
flags.DEFINE_string("tokenizer", None, "directory or hub id of a tokenizer with a chat template", required=True)
flags.DEFINE_string("lengths", None, "JSON list of [prompt, chosen, rejected] in tokens", required=True)
flags.DEFINE_string("workdir", None, "where the pairs, the cache and the figures go", required=True)
flags.DEFINE_integer("pairs", 100_000, "pairs to make")
flags.DEFINE_integer("workers", -1, "processes that tokenize; -1 is one per core, 0 is none but the main one")
flags.DEFINE_integer("row_tokens", 8192, "length of a row of the plan")
flags.DEFINE_enum("stage", "", ["", "first", "second", "read"], "internal: the stage that this process does")

WORDS = 20_000  # of the vocabulary; drawn with the frequencies of Zipf's law


def make_pairs(path: Path, chat: Any, triples: list[list[int]], n: int) -> None:
    """Writes `n` rows of `pair_text`; the tokens of prompt, chosen and rejected follow `triples` over and over."""
    rng = np.random.default_rng(0)
    words = np.array(list(single_tokens(chat.tokenizer)))
    rng.shuffle(words)
    below = np.cumsum(1 / (10 + np.arange(len(words))))  # of a frequency that falls as a power of the rank
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    around = len(chat.encode([chat.render(turns)])[0])  # tokens of the template: counted to the prompt
    draw = lambda count: words[np.searchsorted(below, rng.random(max(count, 1)) * below[-1])]
    with open(path, "w") as file:
        for i in range(n):
            prompt, *responses = triples[i % len(triples)]
            cells = [" ".join(draw(count)) for count in (prompt - around, *responses)]
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), cells))) + "\n")


def single_tokens(tokenizer: Any) -> Iterator[str]:
    """Plain words that are one token after a space."""
    mark = tokenizer.tokenize(" a")[0].removesuffix("a")  # how this vocabulary writes a space before a word
    found = (token.removeprefix(mark) for token in sorted(tokenizer.get_vocab()) if mark and token.startswith(mark))
    plain = [word for word in found if len(word) > 1 and word.isascii() and word.isalpha() and word.islower()]
    if not plain:
        raise ValueError("the tokenizer's vocabulary has no words that are one token after a space")
    yield from plain[:: -(-len(plain) // WORDS)]


def stage(name: str, workdir: Path) -> dict[str, float]:
    """Does a stage in this process; returns seconds of its parts and what it counted."""
    clock = [time.perf_counter()]
    parts: dict[str, float] = {}

    def lap(part: str) -> None:
        clock.append(time.perf_counter())
        parts[f"{part}_s"] = clock[-1] - clock[-2]

    import jax

    from rmjax.batches import chat, groups, loader, packing, tasks, token_cache
    from rmjax.data import ledger

    lap("imports")
    tokenizer = chat.load_tokenizer(FLAGS.tokenizer)
    lap("tokenizer")
    speaker = chat.Chat(tokenizer, max_length=FLAGS.row_tokens)
    lap("template")
    found = token_cache.build(
        str(workdir / "pairs.jsonl"),
        speaker,
        tasks.Preferences(),
        workers=FLAGS.workers,
        cache_dir=workdir / "cache",
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    ).fitting(FLAGS.row_tokens)
    lap("cache")
    if name != "first":
        train, validation = groups.split(found, 0.05, 0)
        ledger.lines(train, validation)
        lap("audit")
        plan = packing.make_plan(
            train.lengths, train.ends, row_tokens=FLAGS.row_tokens, groups_per_step=128, window=2048
        )
        lap("plan")
    if name == "read":
        shape = loader.plan_shape(plan, 2, micro_rows=4, row_devices=1, labels=train.fields)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        for _ in loader.batches(train, plan, shape, rows):
            pass
        lap("batches")
    return {**parts, "groups": len(found), "tokens": int(found.lengths.sum()), "unshared": int(found.unshared.sum())}


def cpu_seconds(who: int) -> float:
    """Of this process, or of all its finished children."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def measure(name: str, workdir: Path) -> dict[str, Any]:
    """Runs a stage in a process of its own and adds its wall time."""
    kept = ("tokenizer", "lengths", "workdir", "workers", "row_tokens")
    arguments = [f"--{key}={getattr(FLAGS, key)}" for key in kept]
    start = time.perf_counter()
    command = [sys.executable, __file__, *arguments, f"--stage={name}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"wall_s": time.perf_counter() - start, **json.loads(done.stdout.splitlines()[-1])}


def line(name: str, values: dict[str, Any]) -> str:
    """One stage in one line."""
    parts = ", ".join(f"{key.removesuffix('_s')} {x:.2f}" for key, x in values.items() if key.endswith("_s"))
    rate = f"; {values['groups'] / values['wall_s']:,.0f} pairs/s" if name == "first" else ""
    cpu, peak = values["cpu"], values["peak_mib"]
    return (
        f"{name}: seconds: {parts}{rate}; CPU {cpu['main']:.1f} s + {cpu['workers']:.1f} s in workers; "
        f"peak {peak['main']:,.0f} MiB, of a worker {peak['worker']:,.0f} MiB"
    )


def main(argv: list[str]) -> None:
    """Makes the pairs, runs the stages and reports; or, in a process of its own, does one stage."""
    del argv
    workdir = Path(FLAGS.workdir)
    if FLAGS.stage:
        memory = Memory()
        memory.start()
        values = stage(FLAGS.stage, workdir)
        cpu = {"main": cpu_seconds(resource.RUSAGE_SELF), "workers": cpu_seconds(resource.RUSAGE_CHILDREN)}
        peak = {"main": memory.peak("self"), "worker": memory.worker}
        print(json.dumps({**values, "cpu": cpu, "peak_mib": peak}))
        return
    from rmjax.batches import chat

    workdir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(workdir / "cache", ignore_errors=True)
    speaker = chat.Chat(chat.load_tokenizer(FLAGS.tokenizer))
    make_pairs(workdir / "pairs.jsonl", speaker, json.loads(Path(FLAGS.lengths).read_text()), FLAGS.pairs)
    figures: dict[str, Any] = {"pairs": FLAGS.pairs}
    for name in ("first", "second", "read"):
        figures[name] = measure(name, workdir)
        print(line(name, figures[name]), flush=True)
    groups, tokens, unshared = (figures["first"][key] for key in ("groups", "tokens", "unshared"))
    print(f"{groups:,} pairs, {tokens:,} tokens, {unshared:,} with every conversation whole")
    (workdir / "tokenizing.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)

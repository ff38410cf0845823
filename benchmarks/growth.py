"""Measures how time and memory grow with the work, at 10 thousand, 100 thousand and 1 million pairs.

    python benchmarks/growth.py --workdir=runs/growth
    python benchmarks/growth.py --workdir=runs/growth --sizes=10000,100000 --phases=score
    python benchmarks/growth.py --workdir=runs/growth --tokenized=1000000        tokenizes and scores the largest, too

Makes files of preference pairs of random words, a quarter as many as the tokens of `rmjax/batches/lengths/hh.json`,
over and over, and runs each phase in a process of its own:

    tokenize   `prepare.build_groups`, worker processes and all, into an empty cache
    audit      `python -m rmjax.data audit FILE --tokenizer=... --html=...`, which finds its groups in that cache
    plan       opens the cache, splits it, and plans one epoch
    batches    the same, then fills 50 batches of it, as training does; timed are the batches
    evaluate   `evaluating.measured` with a model that answers at random: all metrics, with 1,001 resamples
    report     the page of a run of one epoch of 64 pairs a step: a line of metrics for each step, and that evaluation
    score      `python -m rmjax.score` with a model of one layer of width 16

More than --tokenized pairs are neither tokenized nor scored, which are the slowest by far: their cache is written from
the batches of the largest that is, over and over, with other row names, prompts and hashes each time.

Seconds are those of the phase, without the imports. Memory is the peak of the phase's own process (VmHWM), and of its
largest worker; `start_mib` is what the process held before the phase began: Python and the imports. Pages of the
memory-mapped cache count. The figures of each are a JSON file in the workdir; one that is there is not measured again.
"""

import argparse
import itertools
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from peaks import Memory

SIZES = (10_000, 100_000, 1_000_000)
ROW_TOKENS, PER_STEP, BATCHES, SHORTER = 2048, 64, 50, 4


def make_pairs(path: Path, n: int) -> None:
    """Writes `n` pairs of random words of the demo's vocabulary; every prompt is another one."""
    from rmjax.batches.random_groups import read_lengths
    from rmjax.data.synthetic import FILLER, TOPICS

    rng, words, triples = np.random.default_rng(0), np.array([*TOPICS, *FILLER]), -(-read_lengths("hh") // SHORTER)
    with open(path, "w") as file:
        for i in range(n):
            drawn = words[rng.integers(0, len(words), triples[i % len(triples)].sum())].tolist()
            prompt, chosen, _ = np.cumsum(triples[i % len(triples)]).tolist()
            cells = (f"{i}: {' '.join(drawn[:prompt])}", " ".join(drawn[prompt:chosen]), " ".join(drawn[chosen:]))
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), cells))) + "\n")


def make_model(directory: Path, tokenizer: Path) -> None:
    """Writes a model of one reward, of one layer of width 16, beside its tokenizer."""
    from rmjax.batches.chat import load_tokenizer
    from rmjax.models import heads, hf
    from rmjax.models.config import from_hf

    read = load_tokenizer(tokenizer)
    values: dict[str, Any] = {"model_type": "qwen2", "vocab_size": len(read), "hidden_size": 16}
    values |= {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = from_hf(values)
    params = heads.init(config, 1, "float32")
    hf.save(directory, params, values, config, dtype="float32", pad_token_id=0, also=read.save_pretrained)


# ----------------------------------------------------------------------------------------------------
# What a phase's process does: everything up to `yield` is not timed
# ----------------------------------------------------------------------------------------------------


class Work:
    """One file of pairs, and what is done with it."""

    def __init__(self, workdir: Path, groups: int):
        self.workdir, self.count = workdir, groups
        self.pairs, self.tokenizer, self.model = workdir / f"{groups}.jsonl", workdir / "tokenizer", workdir / "model"
        self.cache = workdir / f"cache-{groups}"

    def groups(self) -> Any:
        """As the audit reads them, so that it finds what `tokenize` wrote."""
        from rmjax.batches import prepare, tasks
        from rmjax.config import defaults
        from rmjax.report.audit_command import UNLIMITED

        config = defaults("bradley_terry")
        config.model.tokenizer, config.data.max_length = str(self.tokenizer), UNLIMITED
        config.data.on_bad_row, config.data.max_bad_fraction = "skip", 1.0
        config.data.cache_dir = str(self.cache)
        chat = prepare.open_chat(config, self.workdir)
        return prepare.build_groups(config, chat, tasks.Preferences("keep"), str(self.pairs), file=sys.stderr)

    def copy_of(self, other: "Work") -> None:
        """Writes the cache of these pairs from that of others."""
        import pyarrow as pa

        from rmjax.batches import token_cache
        from rmjax.batches.token_files import Result
        from rmjax.data.ledger import Audit

        (file,) = other.cache.glob("*.arrow")
        reader, hashes = pa.ipc.open_file(str(file)), ("response_sets", "label_ids")

        def results(jobs: Any, work: Any, chat: Any, workers: int) -> Any:
            for copy in range(self.count // other.count):
                for i in range(reader.num_record_batches):
                    batch, note = reader.get_batch_with_custom_metadata(i)
                    columns = {name: batch.column(name) for name in batch.schema.names}
                    columns["id"] = pa.array([f"{copy}-{id}" for id in columns["id"].to_pylist()])
                    for name in hashes:
                        columns[name] = pa.array(columns[name].to_numpy() ^ np.uint64(copy << 32))
                    prompts = columns["histories"]
                    changed = prompts.values.to_numpy() ^ np.uint64(copy << 32)
                    columns["histories"] = pa.ListArray.from_arrays(prompts.offsets, changed)
                    made = pa.RecordBatch.from_arrays(list(columns.values()), schema=batch.schema)
                    yield Result(made, Audit.from_json(note[b"audit"].decode()), "")

        token_cache._run = results
        self.groups()

    def tokenize(self) -> dict[str, float]:
        shutil.rmtree(self.cache, ignore_errors=True)
        begin = time.perf_counter()
        self.groups()
        return {"seconds": time.perf_counter() - begin}

    def audit(self) -> dict[str, float]:
        from rmjax.data.__main__ import main

        command = ["audit", str(self.pairs), f"--tokenizer={self.tokenizer}", f"--html={self.workdir}/audit.html"]
        begin = time.perf_counter()
        main([*command, "--json", f"--config.data.cache_dir={self.cache}"])
        return {"seconds": time.perf_counter() - begin}

    def plan(self) -> dict[str, float]:
        return {"seconds": self._planned()[-1]}

    def _planned(self) -> tuple[Any, Any, float]:
        from rmjax.batches import groups as groups_lib
        from rmjax.batches import packing

        begin = time.perf_counter()
        train, _ = groups_lib.split(self.groups().fitting(ROW_TOKENS), 0.02, 0)
        plan = packing.make_plan(train.lengths, train.ends, row_tokens=ROW_TOKENS, groups_per_step=PER_STEP)
        return train, plan, time.perf_counter() - begin

    def batches(self) -> dict[str, float]:
        import jax

        from rmjax import sharding
        from rmjax.batches import loader

        train, plan, _ = self._planned()
        shape = loader.plan_shape(plan, 2, micro_rows=1, row_devices=1, labels=train.fields)
        mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
        begin = time.perf_counter()
        for _ in itertools.islice(loader.batches(train, plan, shape, sharding.named(mesh, sharding.BATCH)), BATCHES):
            pass
        return {"seconds": time.perf_counter() - begin}

    def evaluate(self) -> dict[str, float]:
        from rmjax.batches import tasks
        from rmjax.batches.chat import Chat, load_tokenizer
        from rmjax.evaluate import evaluating

        groups, rng = self.groups(), np.random.default_rng(0)
        answers = list(rng.normal([[0.5], [0.0]], 1.0, (len(groups), 2, 1)).astype(np.float32))
        model: Any = SimpleNamespace(objective=None, contract=None, has_spread=False)
        model.chat = Chat(load_tokenizer(self.tokenizer))
        model.answers = lambda groups, progress: answers
        model.decode = lambda outputs: {"score": outputs[:, 0]}
        begin = time.perf_counter()
        values = evaluating.measured(model, groups, tasks.Preferences("keep"))
        seconds = time.perf_counter() - begin
        (self.workdir / f"evaluation-{self.count}.json").write_text(json.dumps(values))
        return {"seconds": seconds}

    def report(self) -> dict[str, float]:
        from rmjax.report import run

        rng, steps = np.random.default_rng(0), self.count // PER_STEP
        directory = self.workdir / f"run-{self.count}"
        directory.mkdir(exist_ok=True)
        names = ("train/loss", "train/grad_norm", "train/learning_rate", "train/accuracy")
        with open(directory / "metrics.jsonl", "w") as file:
            for step in range(1, steps + 1):
                values = dict(zip(names, rng.random(len(names)).tolist()))
                file.write(json.dumps({"step": step, **values}) + "\n")
        speed = [f"timing/{name}" for name, *_ in run.SPEED]
        with open(directory / "timings.jsonl", "w") as file:
            for step in range(1, steps + 1):
                file.write(json.dumps({"step": step, **dict(zip(speed, rng.random(len(speed)).tolist()))}) + "\n")
        measured = json.loads((self.workdir / f"evaluation-{self.count}.json").read_text())
        evaluation = {"step": steps, "sets": {"validation": measured}}
        (directory / "evaluation.json").write_text(json.dumps(evaluation))
        begin = time.perf_counter()
        page = run.write_report(directory, run.read_parts(directory))
        return {"seconds": time.perf_counter() - begin, "page_mib": page.stat().st_size / 2**20}

    def score(self) -> dict[str, float]:
        import jax  # noqa: F401

        import rmjax.inference.reward_model  # noqa: F401
        from rmjax.score import __main__ as score

        output = self.workdir / f"scores-{self.count}.jsonl"
        begin = time.perf_counter()
        rows, _ = score.run(str(self.model), str(self.pairs), output)
        assert rows == self.count
        output.unlink()
        return {"seconds": time.perf_counter() - begin}


PHASES = ("tokenize", "audit", "plan", "batches", "evaluate", "report", "score")


def in_this_process(phase: str, work: Work) -> dict[str, float]:
    import rmjax.batches.prepare
    import rmjax.evaluate.evaluating  # noqa: F401

    memory, before = Memory(), cpu_seconds()
    start = memory.peak("self")
    memory.start()
    done = getattr(work, phase)()
    done["cpu"] = cpu_seconds() - before
    return {**done, "start_mib": start, "peak_mib": memory.peak("self"), "worker_mib": memory.worker}


def cpu_seconds() -> float:
    """Of this process and its finished children, what precedes the timed part included."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in used)


def copy_cache(workdir: Path, groups: int, tokenized: int) -> None:
    """In a process of its own, as what it holds is no phase's."""
    if not list((workdir / f"cache-{groups}").glob("*.arrow")):
        command = [sys.executable, __file__, f"--workdir={workdir}", f"--groups={groups}", f"--tokenized={tokenized}"]
        subprocess.run([*command, "--phase=copy"], check=True)


def measure(phase: str, workdir: Path, groups: int) -> dict[str, float]:
    path = workdir / f"{phase}-{groups}.json"
    if not path.exists():
        command = [sys.executable, __file__, f"--workdir={workdir}", f"--phase={phase}", f"--groups={groups}"]
        with open(path.with_suffix(".log"), "w") as log:
            subprocess.run([*command, f"--json={path}"], stdout=log, stderr=log, check=True)
    return json.loads(path.read_text())


def table(figures: dict[str, dict[int, dict[str, float]]]) -> str:
    """Seconds and memory by size, and how many times as long ten times the work takes."""
    sizes = sorted({n for of_phase in figures.values() for n in of_phase})
    head = ["", *(f"{n:,}" for n in sizes), "times per tenfold", *(f"MiB, {n:,}" for n in sizes)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for phase, found in figures.items():
        seconds = [f"{found[n]['seconds']:.2f} s" if n in found else "" for n in sizes]
        pairs = [(a, b) for a, b in itertools.pairwise(sizes) if a in found and b in found]
        times = [f"{(found[b]['seconds'] / found[a]['seconds']) ** (1 / np.log10(b / a)):.1f}" for a, b in pairs]
        both = lambda x: f"{x['peak_mib']:,.0f}" + (f" + {x['worker_mib']:,.0f}" if x["worker_mib"] else "")
        peaks = [both(found[n]) if n in found else "" for n in sizes]
        lines.append(f"| {' | '.join([phase, *seconds, ', '.join(times), *peaks])} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="where data, caches and figures go")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="pairs of each file, separated by commas")
    parser.add_argument("--phases", default=",".join(PHASES), help=f"of {', '.join(PHASES)}, in this order")
    parser.add_argument("--tokenized", type=int, default=100_000, help="most pairs that are tokenized and scored")
    parser.add_argument("--phase", default="", choices=["", "copy", *PHASES], help=argparse.SUPPRESS)  # of this process
    parser.add_argument("--groups", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = parser().parse_args()
    workdir = args.workdir.absolute()
    if args.phase == "copy":
        Work(workdir, args.groups).copy_of(Work(workdir, args.tokenized))
        return
    if args.phase:
        args.json.write_text(json.dumps(in_this_process(args.phase, Work(workdir, args.groups)), indent=1) + "\n")
        return
    from rmjax.data.synthetic import make_tokenizer

    workdir.mkdir(parents=True, exist_ok=True)
    phases = args.phases.split(",")
    if not (workdir / "tokenizer").exists():
        make_tokenizer(workdir / "tokenizer")
    if "score" in phases and not (workdir / "model").exists():
        make_model(workdir / "model", workdir / "tokenizer")
    figures: dict[str, dict[int, dict[str, float]]] = {phase: {} for phase in phases}
    sizes = sorted(map(int, args.sizes.split(",")))
    for n in sizes:
        if not (file := workdir / f"{n}.jsonl").exists():
            make_pairs(file.with_suffix(".partial"), n)
            file.with_suffix(".partial").rename(file)
        if n > args.tokenized:
            copy_cache(workdir, n, max(size for size in sizes if size <= args.tokenized))
        for phase in [phase for phase in phases if n <= args.tokenized or phase not in ("tokenize", "score")]:
            figures[phase][n] = found = measure(phase, workdir, n)
            print(f"{phase} {n:,}: {found['seconds']:.2f} s, {found['peak_mib']:,.0f} MiB", flush=True)
    print(table(figures))


if __name__ == "__main__":
    main()

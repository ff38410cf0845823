"""Measures rmjax on the accelerator that is here, and rewrites the measured part of benchmarks/RESULTS.md.

    python benchmarks/accelerator.py --workdir=runs/accelerator
    python benchmarks/accelerator.py --workdir=runs/accelerator --minutes=10     stops by then, with what it has
    python benchmarks/accelerator.py --workdir=runs/accelerator --page           writes the page of what is there
    python benchmarks/accelerator.py --workdir=runs/smoke --smoke       tiny shapes on any device, to see that it works

What is run, each in a process of its own, the most valuable first:

    columns   `python -m rmjax.benchmark` for the five columns of the table
    kernel    attention alone, forward and forward with backward: 4 rows x 8,192 tokens, 28/4 heads x 128
    sampler   `benchmarks/decoding.py` for two models; --bandwidth is that of one device's memory
    flags     two of the columns again with one XLA flag each, and as they are, to show the noise

The figures of each are a JSON file in the workdir as soon as they are there; one that is there is not measured again,
so a run that was stopped goes on. One that fails is named on the page, and the others are measured. Page and archive
(WORKDIR/results.tar.gz: page, figures and the end of every log) are written again after each. With --minutes nothing
begins that has no time left, nothing takes more than a third of the time, and what runs at the end is stopped. SIGTERM
stops it as well. With --smoke the page goes into the workdir.

On a machine without network, with Python 3.12, jax 0.11.2 and its CUDA plugin: a checkout is enough, rmjax need not be
installed. What `python -c "import rmjax.benchmark.__main__, rmjax.inference.sampler"` lacks there is carried beside it.
Of what comes with JAX, Flax and transformers these are missing as a rule, 5 MB together; here

    pip download --no-deps --only-binary=:all: --python-version=3.12 --platform=manylinux_2_28_x86_64 \\
        --platform=manylinux_2_17_x86_64 --platform=manylinux2014_x86_64 -d wheels \\
        array_record grain ml_collections portpicker

and there, with the archive alone to be carried back (unpack it into WORKDIR, then --page):

    python -m pip install --no-index --no-deps --target=wheels/site wheels/*.whl
    PYTHONPATH=wheels/site python benchmarks/accelerator.py --workdir=DIR --minutes=9
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sessions import Session, write_archive

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "benchmarks" / "RESULTS.md"
BEGIN, END = (
    "<!-- measured by benchmarks/accelerator.py: begin -->",
    "<!-- measured by benchmarks/accelerator.py: end -->",
)
MISSING = "not measured"
# These abort the process on jax 0.11.
FORBIDDEN = ("xla_gpu_enable_custom_fusions", "xla_gpu_enable_address_computation_fusion")

COMMON = {"plan.row_tokens": "8192", "model.remat": "auto", "optim.mu_dtype": "bfloat16"}
# 16,384 tokens a micro-batch (rmjax/hardware/memory.py); small models take four of them a step, so that the update
# costs little.
SMALL = {**COMMON, "plan.rows_per_step": "8"}
# 8 bytes a parameter, for one card of 141 GB: one micro-batch, whose gradient then is bfloat16 too.
LARGE = {**COMMON, "plan.rows_per_step": "2", "model.param_dtype": "bfloat16", "optim.nu_dtype": "bfloat16"}
TINY = {"plan.row_tokens": "256", "plan.rows_per_step": "2", "model.scratch.num_hidden_layers": "1"}


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        size: of Qwen2.5.
        lengths: `hh` or `long`.
        keys: of the config.
    """

    size: str
    lengths: str
    keys: Mapping[str, str]

    @property
    def name(self) -> str:
        """As the table's head has it."""
        return f"{self.size} {self.lengths}"

    def arguments(self, smoke: bool) -> list[str]:
        """Of `python -m rmjax.benchmark`."""
        config = "configs/bt_tiny.py" if smoke else "configs/bt_qwen7b.py"
        keys = TINY if smoke else {"model.init_from": f"Qwen/Qwen2.5-{self.size}", **self.keys}
        return [f"--config={config}", f"--lengths={self.lengths}", *(f"--config.{k}={v}" for k, v in keys.items())]


COLUMNS = (
    Column("0.5B", "hh", SMALL),
    Column("1.5B", "hh", SMALL),
    Column("1.5B", "long", SMALL),
    Column("7B", "hh", LARGE),
    Column("7B", "long", LARGE),
)
SAMPLED = ("qwen2.5-0.5b", "qwen3-4b")  # of decoding.MODELS
SAMPLED_SMALL = ["--work=40x8x4", "--slots=16", "--rounds=1"]
FLAG_COLUMNS = (COLUMNS[0], COLUMNS[3])  # bound by small kernels and by matrix products
# What is tried: its name on the page, and the environment that sets it.
TRIED: tuple[tuple[str, dict[str, str]], ...] = (
    ("as it is, again", {}),
    ("jax_optimization_level=O1", {"JAX_OPTIMIZATION_LEVEL": "O1"}),
    ("--xla_gpu_enable_triton_gemm=false", {}),
    ("--xla_gpu_enable_command_buffer=", {}),
    ("--xla_disable_hlo_passes=rematerialization", {}),
    ("as it is, at the end", {}),
)
# At least a layer of 7B (466 MB) at once; without several devices there is nothing to gather.
TRIED_ON_SEVERAL: tuple[tuple[str, dict[str, str]], ...] = (
    ("--xla_gpu_all_gather_combine_threshold_bytes=536870912", {}),
    ("--xla_gpu_reduce_scatter_combine_threshold_bytes=536870912", {}),
    ("--xla_gpu_enable_pipelined_all_gather=true", {}),
    ("--xla_gpu_enable_pipelined_reduce_scatter=true", {}),
)


def refuse_forbidden(texts: Sequence[str]) -> None:
    """Makes sure that no flag is set that aborts the process.

    Raises:
        ValueError: one is; names it.
    """
    for name in FORBIDDEN:
        if any(name in text for text in texts):
            raise ValueError(f"--{name} aborts the process on jax 0.11; leave it out of XLA_FLAGS and --xla_flag")


def environment(name: str, values: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that tries something of TRIED, or, with nothing, of the others."""
    given = os.environ.get("XLA_FLAGS", "")
    flag = {"XLA_FLAGS": f"{given} {name}".strip()} if name.startswith("--") else {}
    # By default JAX takes three quarters of a GPU's memory, and remat="auto" would fit the step into that.
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ, **flag, **values}


def benchmark(column: Column, smoke: bool, steps: int) -> list[str]:
    """The command that measures a column."""
    return [sys.executable, "-m", "rmjax.benchmark", *column.arguments(smoke), f"--steps={steps}"]


def backend() -> tuple[str, int]:
    """What JAX finds here, asked in a process of its own: one that holds a device keeps its memory from others."""
    code = "import jax; print(jax.default_backend(), jax.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"JAX finds no device: {done.stderr.strip().splitlines()[-1]}")
    platform, count = done.stdout.split()
    return platform, int(count)


def measure_kernel(smoke: bool) -> dict[str, Any]:
    """Seconds and FLOP/s of attention alone, by name of the lengths, in this process."""
    import jax
    import numpy as np

    from rmjax import sharding
    from rmjax.batches import loader, packing
    from rmjax.batches.random_groups import RandomGroups, read_lengths
    from rmjax.benchmark import side
    from rmjax.kernels.tree_attention import choose
    from rmjax.models import config as model_config

    rows, tokens, heads, kv_heads, width = (2, 256, 4, 2, 16) if smoke else (4, 8192, 28, 4, 128)
    values = {"model_type": "qwen2", "vocab_size": 1000, "hidden_size": heads * width, "intermediate_size": 1}
    values |= {"num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    model = model_config.from_hf(values)
    platform = jax.default_backend()
    dtype = "float32" if platform == "cpu" else "bfloat16"
    form, _ = choose("auto", platform, width, dtype)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    found: dict[str, Any] = {}
    for name in ("hh", "long"):
        triples = read_lengths(name)
        groups = RandomGroups(triples[triples.sum(1) < tokens], 1000)
        plan = packing.make_plan(groups.lengths, groups.ends, row_tokens=tokens, rows_per_step=rows)
        shape = loader.plan_shape(plan, 2, micro_rows=rows, row_devices=1, labels=groups.fields)
        batch = next(loader.batches(groups, plan, shape, sharding.named(mesh, sharding.BATCH)))
        where = {field: x[0] for field, x in batch.items() if field in ("positions", "visible_from", "visible_until")}
        forward, both = side.time_attention(where, model, dtype, form, mesh)
        pairs = float(groups.visible_pairs(None)[np.concatenate(plan.rows(0))].sum())
        product = 2 * heads * width * pairs  # FLOPs of one of the two products of the forward pass
        found[name] = {"forward_s": forward, "both_s": both, "visible_pairs": pairs, "form": form, "dtype": dtype}
        found[name] |= {"forward_flops_per_s": 2 * product / forward, "both_flops_per_s": 6 * product / both}
    return found


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    line = lambda cells: f"| {' | '.join(cells)} |"
    return [line(head), f"|{'---|' * len(head)}", *map(line, rows)]


def column_table(reports: Mapping[str, dict[str, Any] | None], failures: Mapping[str, str]) -> list[str]:
    """The figures of each column."""
    percent = lambda x: MISSING if x is None else f"{x:.1%}"
    labels = {
        "**pairs/s**": lambda s: f"**{s['pairs_per_s']:,.1f}**",
        "useful MFU": lambda s: percent(s["mfu_useful"]),
        "hardware MFU": lambda s: percent(s["mfu_hardware"]),
        "real tokens/s": lambda s: f"{s['tokens_per_s']:,.0f}",
        "unshared-equivalent tokens/s": lambda s: f"{s['unshared_tokens_per_s']:,.0f}",
        "step, median (quartiles), ms": lambda s: (
            f"{1e3 * s['step_s']['median']:,.1f} ({1e3 * s['step_s']['q1']:,.1f}, {1e3 * s['step_s']['q3']:,.1f})"
        ),
        "rows full": lambda s: percent(s["fill"]),
        "attention, optimizer, the rest": lambda s: ", ".join(
            percent(None if x is None else x / s["step_s"]["median"]) for x in s["split_s"].values()
        ),
        "wait for data, hidden, ms": lambda s: f"{1e3 * s['data_wait_s']:.2f}",
        "peak memory, GiB": lambda s: f"{s['memory_bytes'] / 2**30:.1f}",
        "until compiled, s": lambda s: f"{s['compile_s']:.1f}",
        "micro-batches x rows x tokens, remat": lambda s: (
            f"{s['micro_batches']} x {s['micro_batch_rows']} x {s['row_tokens']:,}, {s['remat']}"
        ),
    }

    def cell(name: str, show: Any) -> str:
        if report := reports.get(name):
            return show(report["sides"][0])
        return "failed" if name in failures else MISSING

    names = [column.name for column in COLUMNS]
    return grid(["", *names], [[label, *(cell(name, show) for name in names)] for label, show in labels.items()])


def kernel_table(kernel: Mapping[str, Any] | None) -> list[str]:
    """Attention alone."""
    rows = []
    for name in ("hh", "long"):
        cells = [MISSING] * 4
        if kernel:
            x = kernel[name]
            cells = [f"{1e3 * x[key]:.2f}" for key in ("forward_s", "both_s")]
            cells += [f"{x[key] / 1e12:.3g}" for key in ("forward_flops_per_s", "both_flops_per_s")]
        rows.append([name, *cells])
    return grid(["", "forward, ms", "with backward, ms", "TFLOP/s forward", "TFLOP/s with backward"], rows)


def sampler_table(sampled: Mapping[str, dict[str, Any] | None], failures: Mapping[str, str]) -> list[str]:
    """Tokens of responses a second, and how near a step is to the time that reading its bytes takes."""
    rows = []
    for name in sampled or SAMPLED:
        for row in (sampled.get(name) or {}).get("rows", ()):
            cells = [f"{row['tokens_per_s']:,.0f}", f"{1e3 * row['step']:.1f}", f"{row['share']:.0%}"]
            rows.append([name, row["work"].replace("x", " x "), *cells])
        if not sampled.get(name):
            rows.append([name, "", *["failed" if f"sampler {name}" in failures else MISSING] * 3])
    head = ["", "tokens of a prompt x of a response x responses", "tokens/s", "a step, ms", "of the memory's limit"]
    return grid(head, rows)


def flag_table(
    plain: Mapping[str, dict[str, Any] | None],
    tried: Mapping[str, dict[str, Any] | None],
    failures: Mapping[str, str],
    names: Sequence[str],
) -> list[str]:
    """Pairs per second with each flag, and against the column as it is."""

    def cell(flag: str, column: str) -> str:
        here, base = tried.get(f"{column} {flag}"), plain.get(column)
        if not here:
            return "failed" if f"{column} {flag}" in failures else MISSING
        rate = here["sides"][0]["pairs_per_s"]
        return f"{rate:,.1f}" + (f" ({rate / base['sides'][0]['pairs_per_s'] - 1:+.1%})" if base else "")

    head = ["pairs/s", *(column.name for column in FLAG_COLUMNS)]
    return grid(
        head,
        [
            [f"`{flag}`" if "=" in flag else flag, *(cell(flag, column.name) for column in FLAG_COLUMNS)]
            for flag in names
        ],
    )


def page_part(found: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str], command: str) -> str:
    """What stands between the marks; `found` by table and name, those without figures None."""
    reports, tried = found.get("columns", {}), found.get("flags", {})
    report = next((report for report in reports.values() if report), None)
    where = "No accelerator was at hand when this page was written: nothing in this part is measured yet."
    if report:
        device, versions = report["device"], ", ".join(f"{k} {v}" for k, v in report["versions"].items())
        date = datetime.date.fromisoformat(report["date"][:10])
        where = f"{device['count']} x {device['kind']}; {versions}; {date}; `{command}`."
    flags = dict.fromkeys(name.split(" ", 2)[2] for name in tried) or [name for name, _ in TRIED]
    lines = [BEGIN, "", where, "", *column_table(reports, failures), ""]
    lines += ["Attention alone, rows of packed pairs with shared prompts; TFLOP/s count visible pairs only:", ""]
    lines += [*kernel_table(found.get("kernel", {}).get("kernel")), ""]
    lines += ["Sampling, bfloat16, 512 responses at a time (`benchmarks/decoding.py` says what is timed):", ""]
    lines += [*sampler_table(found.get("sampler", {}), failures), "", "XLA flags, one at a time:", ""]
    lines += [*flag_table(reports, tried, failures, list(flags)), ""]
    lines += [f"- `{name}` failed: {text}" for name, text in failures.items()]
    return "\n".join([*lines, *([""] if failures else []), END])


def rewritten(page: str, part: str) -> str:
    """The page with another part between the marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has lost the marks that the tables stand between: {BEGIN} ... {END}")
    return before + part + after


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one process measures, and the table that shows it under the name."""

    table: str
    name: str
    command: Sequence[str]
    env: Mapping[str, str]

    @property
    def title(self) -> str:
        """Of its files."""
        return f"sampler {self.name}" if self.table == "sampler" else self.name


def planned(workdir: Path, smoke: bool, steps: int, more: Sequence[str], devices: int, bandwidth: float) -> Any:
    """All measurements, the most valuable first; `bandwidth` is of one device, GB/s."""
    here, plain = Path(__file__).resolve(), environment("", {})
    yield from (Measurement("columns", c.name, benchmark(c, smoke, steps), plain) for c in COLUMNS)
    this = [sys.executable, str(here), f"--workdir={workdir}", "--kernel", *smoke * ["--smoke"]]
    yield Measurement("kernel", "kernel", this, plain)
    for model in ("tiny",) if smoke else SAMPLED:
        command = [sys.executable, str(here.with_name("decoding.py")), f"--models={model}"]
        command += [f"--bandwidth={bandwidth * devices}", *(SAMPLED_SMALL if smoke else ())]
        # A script's own folder is on its path, the checkout is not.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        yield Measurement("sampler", model, command, plain | {"PYTHONPATH": path})
    choice = TRIED[:1] + TRIED[4:5] if smoke else TRIED + (TRIED_ON_SEVERAL if devices > 1 else ())
    for column in FLAG_COLUMNS[:1] if smoke else FLAG_COLUMNS:
        for name, values in (*choice, *((flag, {}) for flag in more)):
            command, env = benchmark(column, smoke, steps), environment(name, values)
            yield Measurement("flags", f"{column.name} {name}", command, env)


def run(args: argparse.Namespace) -> dict[str, str]:
    """Measures everything and writes page and archive after each; returns what failed.

    Raises:
        ValueError: no accelerator, or a flag that must not be used.
    """
    refuse_forbidden([*args.xla_flag, os.environ.get("XLA_FLAGS", "")])
    seconds, begun = args.minutes * 60 or math.inf, time.monotonic()
    platform, devices = ("", 1) if args.page else backend()
    if platform == "cpu" and not args.smoke:
        raise ValueError("JAX finds no accelerator here, only CPUs; install rmjax[cuda] or rmjax[tpu], or give --smoke")
    workdir = args.workdir.absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    plan = list(planned(workdir, args.smoke, args.steps, args.xla_flag, devices, args.bandwidth))
    session = Session(workdir, len(plan), 0.0 if args.page else seconds - (time.monotonic() - begun))
    found: dict[str, dict[str, Any]] = {}
    told = workdir / "command.txt"  # of what was measured, where the page is written later
    if not (args.page and told.exists()):
        told.write_text(shlex.join(["python", *sys.argv]))
    command = told.read_text()
    target = workdir / PAGE.name if args.smoke else PAGE
    for one in plan:
        try:
            found.setdefault(one.table, {})[one.name] = session.measure(one.title, one.command, one.env)
        finally:
            target.write_text(rewritten(PAGE.read_text(), page_part(found, session.failures, command)))
            archive = write_archive(workdir, target)
    if session.late:
        print(f"there was no time for {len(session.late)}: {', '.join(session.late)}")
    print(f"written: {target}\n{archive}: {archive.stat().st_size / 1000:,.0f} kB")
    return session.failures


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="where the figures go")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes; the page goes into the workdir")
    parser.add_argument("--minutes", type=float, default=0.0, help="time for all; default 0, no limit")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page of what is in the workdir")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each column")
    parser.add_argument("--bandwidth", type=float, default=4800.0, help="GB/s of a device's memory; default an H200's")
    parser.add_argument("--xla_flag", action="append", default=[], help="one more XLA flag to try, --NAME=VALUE")
    parser.add_argument("--kernel", action="store_true", help=argparse.SUPPRESS)  # the process that times attention
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)  # where it writes its figures
    return parser


def main() -> None:
    """Runs the command; an error is one line."""
    args = parser().parse_args()
    if args.kernel:
        sys.path.insert(0, str(ROOT))
        args.json.write_text(json.dumps(measure_kernel(args.smoke)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the measurement that runs
    try:
        failures = run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

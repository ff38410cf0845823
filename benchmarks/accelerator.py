"""Measures rmjax on the accelerator that is here, and rewrites the measured part of benchmarks/RESULTS.md.

    python benchmarks/accelerator.py --workdir=runs/accelerator
    python benchmarks/accelerator.py --workdir=runs/smoke --smoke       tiny shapes on any device, to see that it works

What is run, each in a process of its own:

    columns   `python -m rmjax.benchmark` for the five columns of the table
    kernel    attention alone, forward and forward with backward: 4 rows x 8,192 tokens, 28/4 heads x 128
    flags     two of the columns again with one XLA flag each, and as they are, to show the noise

The figures of each are a JSON file in the workdir; one that is there is not measured again, so a run that was stopped
goes on. One that fails is named on the page, and the others are measured. With --smoke the page goes into the workdir.
"""

import argparse
import dataclasses
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


class Session:
    """Runs measurements one after the other; shows what is done and how long the rest will take.

    Attributes:
        workdir: where the figures are.
        total: measurements that are planned.
        failures: what failed, by the name of the measurement.
    """

    def __init__(self, workdir: Path, total: int):
        self.workdir, self.total, self.failures = workdir, total, dict[str, str]()
        self._count, self._measured, self._begun = 0, 0, time.monotonic()

    def measure(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> dict[str, Any] | None:
        """The figures that a command writes to the file behind its last argument; None if it failed."""
        slug = "".join(c if c.isalnum() or c in ".=" else "_" for c in name)
        path = self.workdir / f"{slug}.json"
        left = ""
        if self._measured:
            each = (time.monotonic() - self._begun) / self._measured
            left = f", about {each * (self.total - self._count) / 60:.0f} minutes left"
        self._count += 1
        print(f"[{self._count}/{self.total}] {name}{left}", flush=True)
        if path.exists():
            return json.loads(path.read_text())
        partial = path.with_suffix(".partial")
        command = [*command, f"--json={partial}"]
        with open(path.with_suffix(".log"), "w") as log:
            code = subprocess.run(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
        self._measured += 1
        if code:
            errors = re.findall(r"^(?:error|\S*Error): .*", path.with_suffix(".log").read_text(), re.MULTILINE)
            self.failures[name] = errors[-1][:300] if errors else f"exit code {code}, see {path.stem}.log"
            print(f"  failed: {self.failures[name]}", flush=True)
            return None
        partial.replace(path)
        return json.loads(path.read_text())


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


def flag_table(
    plain: Mapping[str, dict[str, Any] | None], tried: Mapping[str, dict[str, Any] | None], names: Sequence[str]
) -> list[str]:
    """Pairs per second with each flag, and against the column as it is."""

    def cell(flag: str, column: str) -> str:
        here, base = tried.get(f"{column} {flag}"), plain.get(column)
        if not here:
            return "failed" if f"{column} {flag}" in tried else MISSING
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


def page_part(
    reports: Mapping[str, dict[str, Any] | None],
    kernel: Mapping[str, Any] | None,
    tried: Mapping[str, dict[str, Any] | None],
    flags_tried: Sequence[str],
    failures: Mapping[str, str],
    command: str,
) -> str:
    """What stands between the marks."""
    report = next((report for report in reports.values() if report), None)
    where = "No accelerator was at hand when this page was written: nothing in this part is measured yet."
    if report:
        device, versions = report["device"], ", ".join(f"{k} {v}" for k, v in report["versions"].items())
        date = datetime.date.fromisoformat(report["date"][:10])
        where = f"{device['count']} x {device['kind']}; {versions}; {date}; `{command}`."
    lines = [BEGIN, "", where, "", *column_table(reports, failures), ""]
    lines += ["Attention alone, rows of packed pairs with shared prompts; TFLOP/s count visible pairs only:", ""]
    lines += [*kernel_table(kernel), "", "XLA flags, one at a time:", "", *flag_table(reports, tried, flags_tried), ""]
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


def run(workdir: Path, smoke: bool, steps: int, more: Sequence[str]) -> dict[str, str]:
    """Measures everything and writes the page; returns what failed.

    Raises:
        ValueError: no accelerator, or a flag that must not be used.
    """
    refuse_forbidden([*more, os.environ.get("XLA_FLAGS", "")])
    platform, devices = backend()
    if platform == "cpu" and not smoke:
        raise ValueError("JAX finds no accelerator here, only CPUs; install rmjax[cuda] or rmjax[tpu], or give --smoke")
    columns = FLAG_COLUMNS[:1] if smoke else FLAG_COLUMNS
    choice = TRIED[:1] + TRIED[4:5] if smoke else TRIED + (TRIED_ON_SEVERAL if devices > 1 else ())
    choice = (*choice, *((flag, {}) for flag in more))
    workdir.mkdir(parents=True, exist_ok=True)
    session = Session(workdir, len(COLUMNS) + 1 + len(columns) * len(choice))
    plain = environment("", {})
    reports = {c.name: session.measure(c.name, benchmark(c, smoke, steps), plain) for c in COLUMNS}
    this = [sys.executable, str(Path(__file__).resolve()), f"--workdir={workdir}", "--kernel"] + smoke * ["--smoke"]
    kernel = session.measure("kernel", this, plain)
    tried = {
        f"{column.name} {name}": session.measure(
            f"{column.name} {name}", benchmark(column, smoke, steps), environment(name, values)
        )
        for column in columns
        for name, values in choice
    }
    command = shlex.join(["python", *sys.argv])
    part = page_part(reports, kernel, tried, [name for name, _ in choice], session.failures, command)
    target = workdir / PAGE.name if smoke else PAGE
    target.write_text(rewritten(PAGE.read_text(), part))
    print(f"written: {target}")
    return session.failures


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="where the figures go")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes; the page goes into the workdir")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each column")
    parser.add_argument("--xla_flag", action="append", default=[], help="one more XLA flag to try, --NAME=VALUE")
    parser.add_argument("--kernel", action="store_true", help=argparse.SUPPRESS)  # the process that times attention
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)  # where it writes its figures
    return parser


def main() -> None:
    """Runs the command; an error is one line."""
    args = parser().parse_args()
    if args.kernel:
        args.json.write_text(json.dumps(measure_kernel(args.smoke)))
        return
    try:
        failures = run(args.workdir.absolute(), args.smoke, args.steps, args.xla_flag)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

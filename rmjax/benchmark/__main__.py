r"""Measures how fast a config trains on this hardware. Needs no data, tokenizer or weights.

    python -m rmjax.benchmark --config=configs/bt_qwen7b.py --lengths=hh --json=7b.json
    python -m rmjax.benchmark --config=configs/bt_tiny.py --lengths=hh --config.plan.row_tokens=1024
    ... --config.model.init_from=Qwen/Qwen2.5-1.5B      measures that shape; Qwen2.5 of 0.5B, 1.5B, 7B need no network
    ... --compare=model.remat=full                      also measures the config with this key changed; may be repeated
    ... --compare=configs/bt_qwen0_5b.py                also measures another config; --compare=KEY=VALUE changes it

The command makes pairs of random tokens. --lengths says how long they are: `hh` (short, from real data), `long` (shaped
like recent preference data), or a JSON file with rows of [prompt, chosen, rejected] in tokens. The rest is what a run
does (plan, loader, mesh, compiled step, optimizer), without evaluation and checkpoints.

A rate is the mean work of the measured steps divided by their median time. MFU is FLOP/s divided by what the devices'
data sheet allows in bfloat16. "Useful" FLOPs are what the pairs would cost unshared and unpadded; "hardware" FLOPs are
what is computed for them (rmjax/hardware/flops.py). With --compare the two sides take turns, step by step, so that a
drift of the machine affects both; sides with equal parameters and optimizers share one state, so that both fit where
one does.
"""

import contextlib
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import rmjax
from rmjax.runtime import command_line, config_file, files, passwords

if TYPE_CHECKING:  # imported where it is used, so that --help and a mistyped flag answer at once
    from rmjax.benchmark.side import Side

flags.declare_key_flag("config")
LENGTHS = flags.DEFINE_string("lengths", "hh", "Lengths of pairs in tokens: hh, long, or a JSON file.")
STEPS = flags.DEFINE_integer("steps", 20, "Number of measured steps; three unmeasured ones come first.", lower_bound=1)
COMPARE = flags.DEFINE_multi_string(
    "compare", [], "The other side: KEY=VALUE changes a key of the config, FILE.py is another config."
)
JSON = flags.DEFINE_string("json", "", "JSON file to write the figures to.")
PEAK = flags.DEFINE_float("peak_tflops", 0.0, "Peak TFLOP/s of one device; 0 takes its data sheet's.")


def main(_: Sequence[str]) -> None:
    """Runs what `parse` took; an error is one paragraph."""
    import jax

    logging.set_verbosity(logging.WARNING)
    with command_line.outcome(debug=command_line.DEBUG.value), memory_explained():
        configs = [passwords.hide_in(config_file.CONFIG.value)]
        if COMPARE.value:
            configs.append(passwords.hide_in(other_config(config_file.CONFIG.value, COMPARE.value)))
        path = output(JSON.value)
        jax.config.update("jax_enable_compilation_cache", False)  # compiling is measured too
        report = run(configs, LENGTHS.value, STEPS.value, PEAK.value * 1e12)
        print("\n" + "\n".join(table(report)))
        if path:
            files.check_target(path, "--json")  # again: measuring took its time
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, report, indent=2)


@contextlib.contextmanager
def memory_explained() -> Iterator[None]:
    """Says of a device without memory left what matters."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(in_words(error)) from error


def in_words(error: Exception) -> str:
    """An error's text; of a device without memory left only what matters."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return text
    return (
        f"a device has not enough memory ({text.splitlines()[0][:200]}); set config.model.remat=full, "
        "config.plan.micro_rows=1 or a smaller config.plan.row_tokens, and compare sides in two runs"
    )


def parse(argv: Sequence[str]) -> list[str]:
    """absl's flag parser; what is wrong with the command line or the config file is said in a line or two."""
    with command_line.outcome(debug="--debug" in argv):
        config_file.parse(argv, "--config=FILE.py is")
    return list(argv[:1])


def other_config(config: ConfigDict, changes: Sequence[str]) -> ConfigDict:
    """The config of the other side.

    Args:
        changes: "FILE.py", which replaces it, and "KEY=VALUE", as behind "--config.".

    Raises:
        ValueError: a file or a key that is wrong.
    """
    named = [change for change in changes if "=" not in change]
    if len(named) > 1:
        raise ValueError(f"--compare names {' and '.join(named)}; two sides are compared, so give one file")
    config = config_file.load(named[0]) if named else config.copy_and_resolve_references()
    argv = ["compare", *(f"--config.{change}" for change in changes if "=" in change)]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, "", flag_values=values, lock_config=True, sys_argv=argv)
        values(argv)
    except Exception as error:
        raise ValueError(f"--compare: {config_file.explain(error, argv)}") from error
    return values.config


def output(name: str) -> Path | None:
    """The file for the figures, if there is to be one.

    Raises:
        ValueError: it is a directory or a link, is below a file, or cannot be written.
    """
    if not name:
        return None
    path = Path(name).expanduser().absolute()
    files.check_target(path, f"--json={name}")
    command_line.check_writable(path, f"--json={name}")
    return path


def run(configs: Sequence[ConfigDict], lengths: str, steps: int, peak: float = 0.0) -> dict[str, Any]:
    """Measures one config, or two that take turns.

    Args:
        steps: measured steps of each side.
        peak: FLOP/s of one device; 0 is its data sheet's.

    Returns:
        The report, plain values as --json writes them: seconds, bytes, FLOP/s, and rates per second.

    Raises:
        ValueError: a config or lengths that cannot be used.
        RuntimeError: from the devices, when their memory is not enough.
    """
    import jax

    from rmjax.batches.random_groups import read_lengths
    from rmjax.benchmark import side as measured
    from rmjax.hardware import flops

    triples = read_lengths(lengths)
    sides = [measured.Side(name, config, triples, steps) for name, config in zip("AB", configs)]
    for side in sides:
        print(f"{side.name}: {side.source}, compiling", flush=True)
        print(side.compile(), flush=True)
    for side in sides:
        side.begin(sides[0] if side is not sides[0] else None)
    times = measured.take_turns(sides, steps)
    held = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    device = jax.devices()[0]
    peak = peak or flops.peak(device.device_kind) or 0.0
    results = [figures(side, x, peak) for side, x in zip(sides, times)]
    if len(sides) == 1 and max(held):
        results[0] |= {"memory_bytes": max(held), "memory_source": "device"}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"rmjax": rmjax.__version__}  # its own, as a checkout that was not installed has no metadata
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
        | {"python": platform.python_version()},
        "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "peak_flops_per_s": peak or None,
        "lengths": lengths,
        "steps": steps,
        "sides": results,
        "ratio": quartiles(ratios(sides, times)) if len(sides) == 2 else None,
    }


def quartiles(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    return dict(zip(("q1", "median", "q3"), np.percentile(values, [25, 50, 75]).tolist()))


def ratios(sides: "Sequence[Side]", times: np.ndarray) -> np.ndarray:
    """Pairs per second of the second side over those of the first, turn by turn: float64 [steps]."""
    from rmjax.benchmark.side import WARMUP

    pairs = np.array([[side.done(WARMUP + step).pairs for step in range(times.shape[1])] for side in sides])
    first, second = pairs / times[..., 0]
    return second / first


def figures(side: "Side", times: np.ndarray, peak: float) -> dict[str, Any]:
    """What is reported of one side.

    Args:
        times: float64 [steps, 2], see `take_turns`.
        peak: FLOP/s of one device, or 0.
    """
    from rmjax.benchmark.side import WARMUP

    work = np.mean([side.done(WARMUP + step) for step in range(len(times))], axis=0)
    step_s, shape = quartiles(times[:, 0]), side.shape
    pairs, tokens, unshared, useful, hardware = (work / step_s["median"]).tolist()
    devices = side.mesh.devices.size
    attention, optimizer = side.attention_seconds(), side.optimizer_seconds()
    return {
        "name": side.name,
        "model": side.source,
        "parameters": side.parameters[0],
        "non_embedding_parameters": side.parameters[1],
        "config": json.loads(json.dumps(side.config.to_dict())),
        "remat": side.program.remat,
        "rows_per_step": side.plan.rows_per_step,
        "row_tokens": shape.tokens,
        "micro_batches": shape.micro,
        "micro_batch_rows": shape.rows,
        "left_out": side.left_out,
        "pairs_per_step": float(work[0]),
        "fill": float(work[1]) / (shape.micro * shape.rows * shape.tokens),
        "step_s": step_s,
        "pairs_per_s": pairs,
        "tokens_per_s": tokens,
        "unshared_tokens_per_s": unshared,
        "useful_flops_per_s": useful,
        "hardware_flops_per_s": hardware,
        "mfu_useful": useful / (peak * devices) if peak else None,
        "mfu_hardware": hardware / (peak * devices) if peak else None,
        "memory_bytes": side.compiled_bytes,
        "memory_source": "compiler",
        "compile_s": side.compile_s,
        "split_s": {
            "attention": attention,
            "optimizer": optimizer,
            "matrix_products_and_others": step_s["median"] - attention - (optimizer or 0.0),
        },
        "data_wait_s": float(np.median(times[:, 1])),
    }


def table(report: dict[str, Any]) -> list[str]:
    """The report as lines, a column for each side."""
    sides, device = report["sides"], report["device"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{device['count']} x {device['kind']} ({device['platform']}); {versions}; lengths {report['lengths']}; "
        f"{report['steps']} steps measured",
    ]
    if len(sides) > 1:
        lines.append(f"{'':58}" + "".join(f"{side['name']:>16}" for side in sides))
    lines += [f"{label:58}" + "".join(f"{show(side):>16}" for side in sides) for label, show in rows(report)]
    if ratio := report["ratio"]:
        lines.append(
            f"pairs/s of B over A, turn by turn: median {ratio['median']:.3f}, "
            f"quartiles {ratio['q1']:.3f} and {ratio['q3']:.3f}"
        )
    return lines


def rows(report: dict[str, Any]) -> list[tuple[str, Any]]:
    """What each line of the table is called, and how it is had from a side's figures."""
    percent = lambda x: "-" if x is None else f"{x:.1%}"
    share = lambda name: lambda s: percent(s["split_s"][name] and s["split_s"][name] / s["step_s"]["median"])
    peak = report["peak_flops_per_s"]
    of = f" of {peak / 1e12:,.0f} TFLOP/s" if peak else " (no data sheet; --peak_tflops)"
    memory = "by the devices" if report["sides"][0]["memory_source"] == "device" else "by the compiler's account"
    return [
        ("model", lambda s: s["model"].rpartition("/")[2].removeprefix("config.")),
        ("parameters without the embedding, millions", lambda s: f"{s['non_embedding_parameters'] / 1e6:,.1f}"),
        ("pairs/s", lambda s: f"{s['pairs_per_s']:,.1f}"),
        ("real tokens/s (tokens in trees)", lambda s: f"{s['tokens_per_s']:,.0f}"),
        ("unshared-equivalent tokens/s", lambda s: f"{s['unshared_tokens_per_s']:,.0f}"),
        ("useful TFLOP/s", lambda s: f"{s['useful_flops_per_s'] / 1e12:,.3g}"),
        (f"useful MFU{of}", lambda s: percent(s["mfu_useful"])),
        ("hardware MFU", lambda s: percent(s["mfu_hardware"])),
        ("step, median seconds", lambda s: f"{s['step_s']['median']:.4f}"),
        ("step, quartiles", lambda s: f"{s['step_s']['q1']:.4f} {s['step_s']['q3']:.4f}"),
        ("seconds until the step was compiled", lambda s: f"{s['compile_s']:.1f}"),
        (f"peak memory of a device, GiB, {memory}", lambda s: f"{s['memory_bytes'] / 2**30:.2f}"),
        ("rows full", lambda s: percent(s["fill"])),
        ("pairs a step", lambda s: f"{s['pairs_per_step']:.1f}"),
        ("micro-batches x rows x tokens", lambda s: f"{s['micro_batches']}x{s['micro_batch_rows']}x{s['row_tokens']}"),
        ("remat", lambda s: s["remat"]),
        ("pairs of the file that fit no row", lambda s: f"{s['left_out']}"),
        ("split: attention, timed alone", share("attention")),
        ("split: optimizer, timed alone", share("optimizer")),
        ("split: matrix products and others, the rest", share("matrix_products_and_others")),
        ("wait for data, while devices compute, ms", lambda s: f"{1e3 * s['data_wait_s']:.2f}"),
    ]


def cli() -> None:
    """Parses flags and runs `main`."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    cli()

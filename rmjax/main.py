r"""Trains a reward model and exports it, or continues a run that was stopped.

    python -m rmjax.main --config=configs/bt_tiny.py --workdir=runs/tiny
    python -m rmjax.main --config=configs/bt_qwen7b.py --config.model.init_from=PATH_OR_HUB_ID \
        --config.data.train=FILES --workdir=runs/7b
    ... --dry_run                         trains nothing; shows the audit of the data, the plan, the parameters and
                                          their sharding, and the memory that the compiled step needs
    ... --dry_run --topology=v5p:2x2x4    the same for hardware that is not here (or h200:8), with the bytes that a
                                          step sends between devices and the least seconds that it takes

The same command continues a run that was stopped.

Every key of the config can be given as --config.SECTION.KEY=VALUE. The sections are:

    model         base model, tokenizer, number types, what the backward pass recomputes, attention kernel
    lora          adapters of low rank beside a frozen base (LoRA, QLoRA)
    data          training and validation data, filters, samples, weights of sources, tokenizing
    plan          tokens per row, rows or groups per optimizer step
    objective     options of the loss
    rollout       of `grpo`: how many answers are drawn, how long, and what becomes of those that are cut off
    start         the config of a run that is made first, whose export this one begins with
    optim         optimizer, learning rate and its schedule, weight decay, frozen parameters
    mesh          number of devices along the axes data, fsdp and tensor
    eval          how often the model is evaluated, and on which benchmarks
    gate          thresholds that the finished model is judged by
    checkpoint    where checkpoints go, how often they are saved, how many are kept
    log           progress lines, TensorBoard, report, Weights & Biases
    profile       steps of which a trace is written
    export        checkpoint to export, number type of its weights

The keys outside a section are --config.duration ("300 steps", "2 epochs" or "5000 groups"), --config.seed,
--config.on_nonfinite, --config.hooks ("module:function" that is told what happens), --config.on_hook_error and
--config.debug. rmjax/config.py lists all keys with their defaults.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from rmjax import config as config_lib
from rmjax.runtime import command_line, config_file

flags.declare_key_flag("config")
WORKDIR = flags.DEFINE_string("workdir", "", "Directory for metrics, checkpoints and the export.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Show audit, plan, sharding and memory of the compiled step; train nothing."
)
TOPOLOGY = flags.DEFINE_string(
    "topology", "", "Hardware to compile for in a dry run; need not be here. v5p:2x2x4 or h200:8."
)


def main(_: Sequence[str]) -> None:
    """Runs what `parse` took; see command_line.py for what becomes of errors."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of a GPU; JAX itself takes three quarters
    # Here, so that --help and a mistyped flag answer at once.
    from rmjax import checkpoint
    from rmjax.runtime import compile_cache, processes, signals
    from rmjax.train import training

    logging.set_verbosity(logging.WARNING)
    workdir = Path(WORKDIR.value).expanduser().absolute()
    # At a normal exit Orbax's threads print hundreds of lines about a failure that was reported.
    at_once = (checkpoint.CheckpointError,)
    stopped = "stopped; the same command continues from the last checkpoint"
    with command_line.outcome(
        debug=command_line.DEBUG.value,
        log=workdir / "error.log",
        stopped=stopped,
        at_once=at_once,
        tell=processes.fail,
    ):
        processes.start()
        if not TOPOLOGY.value:  # programs for other hardware are not kept
            compile_cache.keep_programs(dict(config_lib.flatten(config_file.CONFIG.value)).get("data.cache_dir", ""))
        lock = contextlib.nullcontext() if DRY_RUN.value else signals.alone(workdir)
        with signals.Stop().listening() as stop, lock:
            training.run(config_file.CONFIG.value, workdir, DRY_RUN.value, TOPOLOGY.value, stop)
            processes.finish()


def cli() -> None:
    """Parses flags and runs `main`."""
    app.run(main, flags_parser=parse)


def parse(argv: Sequence[str]) -> list[str]:
    """absl's flag parser; what is wrong with the command line or the config file is said in a line or two."""
    with command_line.outcome(debug="--debug" in argv):
        config_file.parse(argv, "--config=FILE.py and --workdir=DIRECTORY are", lambda: bool(WORKDIR.value))
        if TOPOLOGY.value and not DRY_RUN.value:
            raise flags.Error(f"--topology={TOPOLOGY.value} is hardware to compile for, not to train on; add --dry_run")
        if "://" in WORKDIR.value:
            raise flags.Error(
                f"--workdir={WORKDIR.value}: metrics and locks need a directory; checkpoints alone can be there, by "
                f"--config.checkpoint.dir={WORKDIR.value.rstrip('/')}/checkpoints"
            )
        workdir = Path(WORKDIR.value).expanduser().absolute()
        if files := [path for path in (workdir, *workdir.parents) if path.is_file()]:
            raise flags.Error(f"--workdir={WORKDIR.value}: {files[0]} is a file; give a directory")
    return list(argv[:1])


if __name__ == "__main__":
    cli()

"""Runs of a small config as processes of their own, started from one that has imported everything; and what they left.

A run gets real signals and ends with a real exit code. `spoil` names a function of the tests that changes something in
the process before the command begins: the moment of a signal, the clock, a limit of the system.
"""

import json
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import quick

ROOT = Path(__file__).parents[1]
SMALL = {  # the demo made small: 20 steps, seconds
    "duration": "2 epochs",
    "data.train": "synthetic://pairs?n=160&seed=0",
    "data.validation": "synthetic://pairs?n=60&seed=1",
    "model.scratch.hidden_size": 32,
    "model.scratch.intermediate_size": 48,
    "plan.groups_per_step": 16,
    "plan.row_tokens": 256,
    "eval.every": "5 steps",
    "eval.train_groups": 20,
    "checkpoint.every": "3 steps",
    "log.every": "3 steps",
    "log.to": "",
    "log.report": False,
}
TIMEOUT = 180  # seconds; a run takes a few on an idle machine
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["rmjax.train.training", "rmjax.main", "orbax.checkpoint", "rmjax.data.synthetic", "pandas"]
    + ["transformers.models.auto.tokenization_auto", "transformers.models.qwen2.tokenization_qwen2"]  # and torch
)


def flat(values: dict) -> dict:
    """{"optim__name": ...} as {"optim.name": ...}."""
    return {key.replace("__", "."): value for key, value in values.items()}


def small(cache_dir, **values):
    """The small config."""
    config = runpy.run_path(str(ROOT / "configs" / "bt_tiny.py"))["get_config"]()
    config.update_from_flattened_dict({**SMALL, "data.cache_dir": str(cache_dir), **flat(values)})
    return config


class Started:
    """`python -m rmjax.main` with the small config, under way."""

    def __init__(
        self,
        workdir,
        cache_dir,
        spoil: Callable[[], None] | None = None,
        xla_flags: str = quick.FLAGS,
        config: str = "configs/bt_tiny.py",
        small: dict = SMALL,
        **values,
    ):
        keys = {**small, "data.cache_dir": str(cache_dir), **flat(values)}
        argv = [f"--config={config}", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in keys.items())]
        number = len(list(workdir.parent.glob(f"{workdir.name}.*.txt")))
        self.output = workdir.parent / f"{workdir.name}.{number}.txt"
        env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
        self.process = _context.Process(target=_command, args=(argv, str(self.output), env, spoil))
        self.process.start()
        self.pid = self.process.pid

    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text() if self.output.exists() else ""

    def end(self) -> tuple[int, str]:
        """Its exit code, negative for a signal, and all it printed."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, f"still running:\n{self.text()[-3000:]}"
        return self.process.exitcode, self.text()

    def finish(self) -> str:
        """What it printed; it must end well."""
        code, text = self.end()
        assert code == 0, text[-3000:]
        return text

    def send_when(self, number: int, ready: Callable[[], bool]) -> bool:
        """Sends a signal as soon as `ready()`; False if it ended before."""
        deadline = time.monotonic() + TIMEOUT
        while self.process.is_alive() and time.monotonic() < deadline:
            if ready():
                os.kill(self.pid, number)
                return True
            time.sleep(0.002)
        return False


def _command(argv, output, env, spoil) -> None:
    os.environ.update(env)
    os.chdir(ROOT)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    import jax

    from rmjax import main
    from rmjax.runtime import compile_cache

    jax.config.update("jax_platforms", "cpu")  # jax was imported before
    compile_cache.keep_programs()  # with those of the session, so that each is compiled once
    if spoil is not None:
        spoil()
    sys.argv = ["rmjax.main", *argv]
    main.cli()


def metrics(workdir) -> list[dict]:
    """The lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    whole = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    return [json.loads(line) for line in whole]


def column(workdir, name) -> np.ndarray:
    """All values of a metric."""
    return np.array([line[name] for line in metrics(workdir) if name in line])


def checkpoints(workdir) -> list[int]:
    """The steps that are saved and sealed."""
    return steps(workdir / "checkpoints")


def steps(directory) -> list[int]:
    """The steps in a directory of checkpoints that are sealed."""
    return sorted(int(path.parent.name) for path in directory.glob("[0-9]*/manifest.json"))


def same_run(a, b) -> None:
    """Both ended with the same metrics and the same export, byte for byte."""
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "config.json", "reward_contract.json", "tokenizer.json"):
        assert (a / "export" / name).read_bytes() == (b / "export" / name).read_bytes(), name

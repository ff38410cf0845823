r"""Trains a reward model.

    python -m rmjax.main --config=configs/bt_tiny.py --workdir=runs/tiny
    python -m rmjax.main --config=configs/bt_qwen7b.py --config.model.init_from=PATH_OR_HUB_ID \
        --config.data.train=FILES --workdir=runs/7b
    ... --dry_run       audit, plan, parameters, sharding and compiled memory, without training
    ... --dry_run --topology=v5p:2x2x4      the same for hardware that is not here (or h200:8 ...), what a step sends,
                                            and the time it takes at least

Every key of the config can be given as --config.KEY=VALUE; rmjax/config.py lists them. The same command continues a
run that was stopped.
"""

import contextlib
import difflib
import os
import re
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rmjax import config as config_lib
from rmjax.runtime import command_line

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, e.g. configs/bt_tiny.py.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "", "Where metrics, checkpoints and the export go.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show audit, plan, sharding and compiled memory; train nothing.")
TOPOLOGY = flags.DEFINE_string("topology", "", "Of a dry run: hardware that need not be here, v5p:2x2x4 or h200:8.")


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
            compile_cache.keep_programs(dict(config_lib.flatten(CONFIG.value)).get("data.cache_dir", ""))
        lock = contextlib.nullcontext() if DRY_RUN.value else signals.alone(workdir)
        with signals.Stop().listening() as stop, lock:
            training.run(CONFIG.value, workdir, DRY_RUN.value, TOPOLOGY.value, stop)
            processes.finish()


def cli() -> None:
    """Parses flags and runs `main`."""
    app.run(main, flags_parser=parse)


def parse(argv: Sequence[str]) -> list[str]:
    """absl's flag parser; what is wrong with the command line or the config file is said in a line or two."""
    with command_line.outcome(debug="--debug" in argv):
        parse_config(argv, "--config=FILE.py and --workdir=DIRECTORY are", lambda: bool(WORKDIR.value))
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


def parse_config(argv: Sequence[str], needed: str, also: Callable[[], bool] = lambda: True) -> None:
    """Reads the flags, --config among them.

    Args:
        argv: the command line.
        needed: the flags that are, in words.
        also: whether those beside --config are there.

    Raises:
        ValueError: a mistake on the command line or in the config file, explained.
    """
    try:
        command_line.parse(argv)
        if not isinstance(CONFIG.value, ConfigDict) or not also():
            raise flags.Error(f"{needed} required; --help shows commands that run")
    except Exception as error:
        raise ValueError(explain(error, argv)) from error


def explain(error: Exception, argv: Sequence[str]) -> str:
    """What is wrong with the config file (flags pass over some of it), else with keys, else what the error says."""
    path = re.search(r"^--?config[=\n](.*)$", "\n".join(argv), re.MULTILINE)
    try:
        config = load_config(path[1]) if path else config_lib.defaults()
    except ValueError as problem:
        return str(problem)
    keys = [key for key, _ in config_lib.flatten(config)]
    asked = (re.match(r"--?config\.([\w.]+)", arg) for arg in argv)
    wrong = [_wrong_key(match[1], keys) for match in asked if match and match[1] not in keys]
    return "\nerror: ".join(wrong) or str(error.args[0] if error.args else error)


def _wrong_key(key: str, keys: Sequence[str]) -> str:
    if group := [k for k in keys if k.startswith(f"{key}.")]:
        inner = ", ".join(dict.fromkeys(k.removeprefix(f"{key}.").partition(".")[0] for k in group))
        return f"--config.{key} is a group of keys ({inner}); give one, e.g. --config.{group[0]}=VALUE"
    near = difflib.get_close_matches(key, keys, 1)
    return f"there is no config key {key!r}" + (f"; did you mean --config.{near[0]}?" if near else "")


def load_config(path: str) -> ConfigDict:
    """Runs a config file, FILE.py or FILE.py:ARGUMENT; a ValueError says what is wrong with it, and in which line."""
    path, colon, argument = path.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"there is no config file {path!r}; looked from {Path.cwd()}")
    try:
        config = runpy.run_path(path)["get_config"](*[argument] if colon else [])
    except Exception as error:
        lines = [f", line {at.lineno}" for at in traceback.extract_tb(error.__traceback__) if at.filename == path]
        raise ValueError(f"config file {path}{lines[-1] if lines else ''}: {_failure(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"config file {path}: get_config() returned {type(config).__name__}, expected a ConfigDict")
    return config


def _failure(error: Exception) -> str:
    """An error in a config file; for a wrong key ml_collections' shows the values of all others."""
    if str(error) == "'get_config'":
        return "it defines no get_config()"
    text = str(error)
    if near := re.search(r'Did you mean "(.*?)" instead of "(.*?)"', text):
        return f"there is no key {near[2]!r}; did you mean {near[1]!r}?"
    if wrong := re.search(r'Key "(.*?)" does not exist and cannot be added.*present: "({})?', text):
        return f"there is no key {wrong[1]!r}" + ("; set this group whole, to ConfigDict({...})" if wrong[2] else "")
    return f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    cli()

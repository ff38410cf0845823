r"""Trains a reward model.

    python -m rmjax.main --config=configs/bt_tiny.py --workdir=runs/tiny
    python -m rmjax.main --config=configs/bt_qwen7b.py --config.model.init_from=PATH_OR_HUB_ID \
        --config.data.train=FILES --workdir=runs/7b
    ... --dry_run       audit, plan, parameters, sharding and compiled memory, without training

Every key of the config can be given as --config.KEY=VALUE; rmjax/config.py lists them. The same command continues a
run that was stopped.
"""

import contextlib
import difflib
import os
import re
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rmjax import config as config_lib

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, e.g. configs/bt_tiny.py.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "", "Where metrics, checkpoints and the export go.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show audit, plan, sharding and compiled memory; train nothing.")


def main(_: Sequence[str]) -> None:
    """Runs what `parse` took; an error is one paragraph, its traceback is in the workdir."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of a GPU; JAX itself takes three quarters
    from rmjax import checkpoint, startup, train  # here, so that --help and a mistyped flag answer at once

    logging.set_verbosity(logging.WARNING)
    workdir = Path(WORKDIR.value).expanduser().absolute()
    startup.keep_programs(dict(config_lib.flatten(CONFIG.value)).get("data.cache_dir", ""))
    try:
        train.run(CONFIG.value, workdir, DRY_RUN.value)
    except (ValueError, OSError, RuntimeError) as error:
        if CONFIG.value.debug:
            raise
        print(f"\nerror: {error}", file=sys.stderr)
        with contextlib.suppress(OSError):  # no workdir, or a full disk
            (workdir / "error.log").write_text(traceback.format_exc())
            print(f"(the traceback is in {workdir / 'error.log'})", file=sys.stderr)
        if isinstance(error, checkpoint.CheckpointError):
            sys.stderr.flush()
            os._exit(1)  # at a normal exit Orbax's threads print hundreds of lines about the same failure
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def cli() -> None:
    """Parses flags and runs `main`."""
    app.run(main, flags_parser=parse)


def parse(argv: Sequence[str]) -> list[str]:
    """absl's flag parser; what is wrong with the command line or the config file is said in a line or two."""
    try:
        others = flags.FLAGS(list(argv))
        if others[1:]:
            raise flags.Error(f"unexpected arguments {others[1:]}; options are written --name=value")
        if not isinstance(CONFIG.value, ConfigDict) or not WORKDIR.value:
            raise flags.Error("--config=FILE.py and --workdir=DIRECTORY are required; --help shows commands that run")
        workdir = Path(WORKDIR.value).expanduser().absolute()
        if files := [path for path in (workdir, *workdir.parents) if path.is_file()]:
            raise flags.Error(f"--workdir={WORKDIR.value}: {files[0]} is a file; give a directory")
        return others
    except Exception as error:
        print(f"error: {explain(error, argv)}", file=sys.stderr)
        sys.exit(2)


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
    text = str(error) if str(error) != "'get_config'" else "it defines no get_config()"
    if near := re.search(r'Did you mean "(.*?)" instead of "(.*?)"', text):
        return f"there is no key {near[2]!r}; did you mean {near[1]!r}?"
    if wrong := re.search(r'Key "(.*?)" does not exist and cannot be added.*present: "({})?', text):
        return f"there is no key {wrong[1]!r}" + ("; set this group whole, to ConfigDict({...})" if wrong[2] else "")
    return f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    cli()

"""The flag --config=FILE.py of commands that train or measure; explains what is wrong with it."""

import re
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from rmjax import config as config_lib
from rmjax.runtime import command_line
from rmjax.suggestions import did_you_mean

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Python file that defines the config, configs/bt_tiny.py for example.", lock_config=True
)


def parse(argv: Sequence[str], needed: str, also: Callable[[], bool] = lambda: True) -> None:
    """Reads the flags, --config among them; a ValueError explains a mistake on the command line or in the config file.

    `needed` names the required flags; `also` says whether those beside --config are there.
    """
    try:
        command_line.parse(argv)
        if not isinstance(CONFIG.value, ConfigDict) or not also():
            raise flags.Error(f"{needed} required; --help shows commands that run")
    except Exception as error:
        raise ValueError(explain(error, argv)) from error


def explain(error: Exception, argv: Sequence[str]) -> str:
    """What is wrong with the config file (flags pass over some of it), else with keys, else the error's own text."""
    path = re.search(r"^--?config[=\n](.*)$", "\n".join(argv), re.MULTILINE)
    try:
        config = load(path[1]) if path else config_lib.defaults()
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
    return f"there is no config key {key!r}{did_you_mean(key, keys, '--config.{}')}"


def load(path: str) -> ConfigDict:
    """Runs a config file, FILE.py or FILE.py:ARGUMENT; a ValueError names the mistake and its line."""
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
    """An error in a config file; for a wrong key ml_collections' own shows the values of all others."""
    if str(error) == "'get_config'":
        return "it defines no get_config()"
    text = str(error)
    if near := re.search(r'Did you mean "(.*?)" instead of "(.*?)"', text):
        return f"there is no key {near[2]!r}; did you mean {near[1]!r}?"
    if wrong := re.search(r'Key "(.*?)" does not exist and cannot be added.*present: "({})?', text):
        return f"there is no key {wrong[1]!r}" + ("; set this group whole, to ConfigDict({...})" if wrong[2] else "")
    return f"{type(error).__name__}: {text}"

"""Config keys, durations, the shipped configs, and mistyped keys on the real command line."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from rmjax import config as config_lib
from rmjax.config import defaults

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def usable(**values):
    config = defaults()
    config.data.train = "x.jsonl"
    config.model.init_from = "y"
    for key, value in values.items():
        with config.unlocked():
            config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_usable_and_documented(path):
    module = runpy.run_path(str(path))
    config = module["get_config"]()
    config_lib.check(config)
    text = module["__doc__"]
    assert f"--config=configs/{path.name}" in text and "Hardware:" in text and "core" in text.lower()
    assert config_lib.differences(config_lib.to_json(config), config_lib.to_json(config)) == []


def test_every_problem_is_named_at_once():
    config = defaults()
    config.optim.schedule = "cosin"
    config.plan.row_tokens = 0
    config.eval.every = "often"
    config.data.template_kwargs = "[1]"
    with pytest.raises(ValueError) as error:
        config_lib.check(config)
    for part in ("data.train is empty", "init_from is empty", "did you mean 'cosine'", "plan.row_tokens=0"):
        assert part in str(error.value)
    assert "'often' is no duration" in str(error.value) and "not a JSON object" in str(error.value)


def test_unknown_key_in_a_config_file_names_the_nearest():
    with pytest.raises(AttributeError, match='Did you mean "init_from"'):
        defaults().model.init_form = "x"


@pytest.mark.parametrize(
    "text,steps",
    [("7 steps", 7), ("1 step", 1), ("2 epochs", 20), ("0.5 epochs", 5), ("640 groups", 10), ("10%", 3), ("0%", 0)],
)
def test_durations(text, steps):
    assert config_lib.steps_of(text, steps_per_epoch=10, groups_per_step=64, total=30) == steps


@pytest.mark.parametrize("text", ["7", "ten steps", "-1 steps", "5 minutes", "", "1.2.3 epochs"])
def test_not_durations(text):
    with pytest.raises(ValueError, match="no duration"):
        config_lib.parse_duration(text)


def test_a_share_of_the_run_is_no_length_of_the_run():
    with pytest.raises(ValueError, match="not a share of itself"):
        config_lib.steps_of("10%", steps_per_epoch=10, groups_per_step=64)


def test_differences_name_keys_and_both_values():
    before, now = usable(), usable(seed=3)
    assert config_lib.differences(config_lib.to_json(before), config_lib.to_json(now)) == [
        "config.seed: 0 before, 3 now"
    ]


@pytest.mark.parametrize(
    "flag,said",
    [
        ("--config.optim.learning_rte=1", "did you mean --config.optim.learning_rate?"),
        ("--config.modle.init_from=x", "did you mean --config.model.init_from?"),
        ("--config.optim.learning_rate=fast", "learning_rate"),
        ("--wrkdir=x", "workdir"),
    ],
)
def test_mistyped_flags_on_the_command_line(flag, said, tmp_path):
    command = [sys.executable, "-m", "rmjax.main", "--config=configs/bt_tiny.py", f"--workdir={tmp_path}", flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr

"""Config keys, durations, the shipped configs, and mistyped keys on the real command line."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

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


def test_a_config_that_is_not_made_from_the_defaults():
    with pytest.raises(ValueError, match=r"lacks .*model.init_from.*start from rmjax.config.defaults"):
        config_lib.check(ConfigDict({"seed": 0}))


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
        ("--config.model.scratch.hidden=3", "did you mean --config.model.scratch.hidden_size?"),
        ("--config.optim=3", "--config.optim is a group of keys (b1, b2, "),
        ("--workdir=README.md", "README.md is a file; give a directory"),
        ("--workdir=README.md/run", "README.md is a file; give a directory"),
        ("--workdir=", "--config=FILE.py and --workdir=DIRECTORY are required"),
        ("stray", "unexpected arguments ['stray']"),
    ],
)
def test_mistyped_flags_on_the_command_line(flag, said, tmp_path):
    assert said in refusal("--config=configs/bt_tiny.py", f"--workdir={tmp_path}", flag)


def refusal(*flags):
    """What the command line says to flags it does not take: one sentence."""
    command = [sys.executable, "-m", "rmjax.main", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 400
    return done.stderr


SET = "from rmjax.config import defaults\n\ndef get_config():\n    config = defaults()\n    {}\n    return config\n"


@pytest.mark.parametrize(
    "text,said",
    [
        (SET.format("config.optim.learning_rte = 1"), ", line 5: there is no key 'learning_rte'; did you mean"),
        (SET.format("config['optim']['learning_rte'] += 1"), "did you mean 'learning_rate'?\n"),
        (SET.format("config.model.scratch.width = 1"), "'width'; set this group whole"),
        (SET.format("config.optim.zzz = 1"), "there is no key 'zzz'\n"),
        (SET.format("config.seed = 1 / 0"), ", line 5: ZeroDivisionError: division by zero"),
        (SET.format("config.seed = 'x'"), ", line 5: TypeError"),
        (SET.format("open('gone.txt')"), ", line 5: FileNotFoundError"),
        (SET.format("config = config.to_dict()"), "get_config() returned dict"),
        (SET.format("config = (1"), "SyntaxError: '(' was never closed (my.py, line 5)"),
        ("x = 1\n", "it defines no get_config()"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_one_sentence(text, said, tmp_path):
    path = tmp_path / "my.py"
    path.write_text(text)
    message = refusal(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert str(path) in message and said in message


def test_a_config_file_that_is_not_there(tmp_path):
    assert "there is no config file 'gone.py'" in refusal("--config=gone.py", f"--workdir={tmp_path}")
    assert "there is no config file 'gone.py'" in refusal("--config", "gone.py", "--config.seed=1", "--workdir=x")


def test_help_shows_commands_and_no_flags_say_which_are_needed():
    command = [sys.executable, "-m", "rmjax.main", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "--config=configs/bt_tiny.py --workdir=" in done.stdout and "--[no]dry_run" in done.stdout
    assert "--config=FILE.py and --workdir=DIRECTORY are required" in refusal()

"""What comes from elsewhere runs no code and reads no file that it should not; passwords and tokens are not written."""

import ast
import json
import os
import pickle
import re
import tomllib
from pathlib import Path

import pytest
import sqlalchemy
from absl import flags

from rmjax import config as config_lib
from rmjax.batches.chat import Chat, load_tokenizer
from rmjax.data import sources
from rmjax.data.sources import database
from rmjax.judging import verdicts
from rmjax.models import hf, weight_files
from rmjax.runtime import command_line, ownership, passwords
from rmjax.train import training

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "rmjax").rglob("*.py"))
SECRET = "pa55-Word_9"
DATABASE = f"postgresql://me:{SECRET}@127.0.0.1:1/db?table=t"


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# Pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_unread(name, tmp_path):
    marker = tmp_path / "ran"
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / name).write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(ValueError, match="pickled weights are not read"):
        weight_files.open_tensors(directory)
    renamed = directory / "model.safetensors"
    (directory / name).rename(renamed)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        weight_files.open_tensors(directory)
    assert not marker.exists()


def test_nothing_here_unpickles_or_evaluates_what_is_read():
    """`eval` of pandas is for config.data.filter alone, whose expression is checked node by node before."""
    loads = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names]
                assert not loads & {name.partition(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert called not in ("eval", "exec") or path.name == "select.py", (path, node.lineno)
            if isinstance(node, ast.keyword):
                value = getattr(node.value, "value", None)
                assert (node.arg, value) not in (("allow_pickle", True), ("weights_only", False)), path
                assert node.arg != "trust_remote_code" or value is False, path


# Code that comes with models


def test_code_of_a_tokenizer_or_a_model_is_not_run(tokenizer_dir, tmp_path, monkeypatch):
    """Its own class is refused where there is no other; transformers' class reads it where there is one."""
    marker = tmp_path / "ran"
    model = tmp_path / "model"
    model.mkdir()
    for file in tokenizer_dir.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run it"))
    own = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}}
    settings = json.loads((model / "tokenizer_config.json").read_text())
    for more in (own, {**own, "tokenizer_class": "Evil"}):
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, **more}))
        for model_type in ("qwen2", "evil"):
            (model / "config.json").write_text(json.dumps({"model_type": model_type, **own}))
            try:
                assert load_tokenizer(model).chat_template
            except ValueError as error:
                assert str(model) in str(error)
            assert not marker.exists()
    assert hf.read_config(model)["model_type"] == "evil" and not marker.exists()


# Templates

ESCAPES = [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.getcwd() }}",
    "{{ self._TemplateReference__context }}{{ self.__init__.__globals__ }}",
    "{{ messages | attr('__class__') | attr('__mro__') }}{{ (messages | attr('__class__')).x.y }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{% set _ = messages.append(1) %}",
    "{% set _ = messages[0].update({'role': 'x'}) %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(escape, tokenizer):
    each = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer.chat_template = escape + each
    with pytest.raises(ValueError, match="the chat template cannot render a plain conversation: "):
        Chat(tokenizer)


@pytest.mark.parametrize("escape", [x.replace("messages", "conversation") for x in ESCAPES if "append" not in x])
def test_a_judging_template_stays_in_its_sandbox(escape, tmp_path):
    (tmp_path / "judge.jinja").write_text(f"{escape}{{{{ response_a }}}}{{{{ response_b }}}}")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "judge.jinja"))):
        verdicts.load_template(str(tmp_path / "judge.jinja"), "pairwise")


def test_every_template_environment_is_a_sandbox():
    for path in SOURCES:
        assert "jinja2.Environment(" not in path.read_text(), path


# Paths


def test_an_index_names_files_beside_it_only(tmp_path):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    names = ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin", "./x.safetensors"]
    for name in [*names, 3, None, ["x.safetensors"]]:
        index = {"weight_map": {"model.norm.weight": name}}
        (directory / hf.INDEX).write_text(json.dumps(index))
        with pytest.raises(ValueError, match=re.escape(hf.INDEX)):
            weight_files.open_tensors(directory)


def test_what_stands_in_data_names_no_file(tmp_path):
    """`state.json` of a saved data set lists its files; only those in its folder can be meant."""
    (tmp_path / "secret.jsonl").write_text('{"prompt": "secret", "chosen": "a", "rejected": "b"}\n')
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"prompt": "../secret.jsonl", "chosen": "a", "rejected": "b"}\n')
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.jsonl"}]}))
    with pytest.raises(ValueError, match=r"set lacks \.\./secret\.jsonl, which its state\.json names"):
        list(sources.open_source(str(folder)))
    (folder / "state.json").unlink()
    rows = [row for _, row in sources.open_source(str(folder))]
    assert [row["prompt"] for row in rows] == ["../secret.jsonl"]


# Passwords and tokens


def test_a_password_is_hidden_and_comes_back_for_the_database():
    hidden = passwords.hide(f"a.jsonl,{DATABASE}")
    assert hidden == "a.jsonl,postgresql://me:***@127.0.0.1:1/db?table=t" and passwords.hide(hidden) == hidden
    assert passwords.reveal(hidden.split(",")[1]) == DATABASE
    other = passwords.hide("postgresql+psycopg2://h/db?user=me&password=x9x9x9x9&table=t")
    assert "x9" not in other and passwords.reveal(other).count("x9x9x9x9") == 1
    for plain in ("a.jsonl", "hf://datasets/o/n@main/a.parquet", "sqlite:///a.db?query=SELECT '@' FROM t", "a:b@c"):
        assert passwords.hide(plain) == plain


@pytest.mark.parametrize("password", ["a", "p@ss", "p:w", "x/y", "with,comma", "a%20b", "pässwörd"])
def test_passwords_of_all_characters_are_hidden(password):
    url = f"postgresql://me:{password}@host/db?table=t"
    assert passwords.hide(url) == "postgresql://me:***@host/db?table=t"
    assert (
        passwords.masked(f"{url}, {url}") == "postgresql://me:***@host/db?table=t, postgresql://me:***@host/db?table=t"
    )


def test_the_driver_is_given_the_password_and_errors_are_not(monkeypatch):
    """The error is psycopg's where that is installed, and else says what to install."""
    made = []
    create = sqlalchemy.create_engine
    monkeypatch.setattr(sqlalchemy, "create_engine", lambda url, **more: made.append(url) or create(url, **more))
    with pytest.raises(ValueError, match=r"postgresql://me:\*\*\*@127\.0\.0\.1:1/db") as error:
        database.database_part(passwords.hide(DATABASE))
    assert made[0].password == SECRET and SECRET not in str(error.value)


def test_no_password_reaches_what_is_made_of_a_config():
    config = config_lib.defaults()
    config.data.train = config.data.validation = DATABASE
    passwords.hide_in(config)
    assert SECRET not in config_lib.to_json(config) + str(config) and config.data.train.endswith("?table=t")
    again = config_lib.defaults()
    again.data.train = again.data.validation = DATABASE.replace(SECRET, "another")
    passwords.hide_in(again)  # a password may change between the runs of a workdir
    assert not config_lib.differences(config_lib.to_json(config), config_lib.to_json(again))


@pytest.mark.parametrize(
    "key", [*(key for key, value in config_lib.defaults().eval.items() if isinstance(value, str)), "another"]
)
def test_a_password_is_hidden_wherever_in_a_config_it_stands(key):
    config = config_lib.defaults()
    config.data.train = "a.jsonl"
    value = f"reward_bench={DATABASE}"
    with config.unlocked():
        config.eval[key] = value
        config.more = {"list": ["x", value], "tuple": (1, (value,)), "deeper": {"still": [{value: value}]}}
    passwords.hide_in(config)
    assert SECRET not in str(config) and str(config).count("reward_bench=postgresql://me:***@127.0.0.1:1/db") >= 5
    assert passwords.reveal(config.eval[key]) == value and config.more.tuple[0] == 1
    assert config.data.train == "a.jsonl"


def test_the_source_of_a_benchmark_gets_its_password_back(monkeypatch):
    asked = []
    monkeypatch.setitem(sources.SCHEMES, "vault", lambda item: asked.append(passwords.reveal(item)) or [])
    config = config_lib.defaults()
    config.eval.benchmarks = f"reward_bench=vault://me:{SECRET}@host/pairs"
    passwords.hide_in(config)
    sources.parts(config.eval.benchmarks.partition("=")[2])
    assert asked == [f"vault://me:{SECRET}@host/pairs"] and SECRET not in config_lib.to_json(config)


def test_an_error_shows_no_secret(monkeypatch, capsys, tmp_path):
    token = "hf_" + "AbCdEfGhIj" * 3
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = f"cannot reach {DATABASE} with {token} and 0123456789abcdef"
    log = tmp_path / "error.log"
    ownership.write_marker(tmp_path, "run", "id")
    for error, code in ((ValueError(text), 2), (RuntimeError(text), 1)):
        with pytest.raises(SystemExit) as stop, command_line.outcome(debug=True, log=log):
            raise error
        assert stop.value.code == code
    said = capsys.readouterr().err + log.read_text()
    assert said.count("Traceback") == 3 and said.count("***") >= 3
    assert not any(secret in said for secret in (SECRET, token, "0123456789abcdef"))
    with pytest.raises(SystemExit), command_line.outcome():
        raise flags.Error(text)
    assert SECRET not in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_writes_and_prints_no_password(tmp_path, monkeypatch, capfd):
    """Of a source that is given its password: logs, config, audit, metrics, checkpoints, export, cache."""
    asked = []

    def vault(item):
        asked.append(SECRET in passwords.reveal(item))
        return sources.parts("synthetic://pairs?n=200")

    monkeypatch.setitem(sources.SCHEMES, "vault", vault)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + SECRET * 2)
    config = config_lib.demo()
    config.data.train = f"vault://me:{SECRET}@host/pairs"
    config.duration = "2 steps"
    training.run(config, tmp_path / "run")
    said = "".join(capfd.readouterr())
    assert asked and all(asked) and "vault://me:***@host/pairs" in said and SECRET not in said
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "audit.json", "metrics.jsonl", "reward_contract.json"} <= {path.name for path in written}
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


# Dependencies


def test_dependencies_are_ranges_and_the_lock_pins_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert all(re.fullmatch(r"[\w.+!-]+", version) for version in pinned.values())  # no address, no path
    for wanted in project["dependencies"]:
        name, _, versions = re.match(r"([\w-]+)(\[.*\])?(.*)", wanted).groups()
        assert ">=" in versions and ("<" in versions or name in ("fsspec", "pyarrow")), wanted  # by date, by quarter
        assert name.lower().replace("_", "-") in pinned, wanted

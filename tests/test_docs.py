"""The README and the manual name only what exists: files, modules, links, commands and their flags, config keys."""

import functools
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax.batches import select
from rmjax.data.formats import FORMATS
from rmjax.evaluate.benchmarks import BENCHMARKS
from rmjax.runtime import exits

ROOT = Path(__file__).parents[1]
INCLUDES = "--8<-- "  # begins a page of docs/ that only includes another file
MANUAL = [page for page in ROOT.glob("docs/**/*.md") if not page.read_text().startswith(INCLUDES)]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")), *sorted(MANUAL)]
FOLDERS = "rmjax|configs|tests|benchmarks|launch|colabs|docs"
COMMANDS = ("main", "evaluate", "sample", "score", "export", "serve", "benchmark", "data")
ABSL = ("main", "benchmark", "score")  # the other commands parse with argparse
PARTS = {"data": ("inspect", "convert", "split", "audit", "keep_right")}
OF_OTHERS = ("rmjax.inference.openjudge",)  # modules that need a package which is not here
CONFIG_FILES = ("json", "md", "py", "xml")  # config.json is a file, not a key

name_of = lambda page: str(page.relative_to(ROOT))
pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


@functools.cache
def flags_of(command: str) -> set[str]:
    """The flags of "score", "data inspect" and the like, without dashes."""
    name, _, part = command.partition(" ")
    module = importlib.import_module("rmjax.main" if name == "main" else f"rmjax.{name}.__main__")
    if name in ABSL:
        return {flag.name for flag in flags.FLAGS.get_key_flags_for_module(module.__name__)} | {"debug", "help"}
    parser = module._parser()[1][part] if name == "data" else module.parser()
    return {option.removeprefix("--") for action in parser._actions for option in action.option_strings}


@functools.cache
def config_keys() -> set[str]:
    """All keys of all objectives and their sections: "optim", "optim.learning_rate", ..."""
    configs = [config_lib.defaults(objective) for objective in config_lib.OBJECTIVES]
    keys = {key for config in configs for key, _ in config_lib.flatten(config)}
    return keys | {key for config in configs for key in config}


def commands(text: str) -> list[tuple[str, str]]:
    """Commands as ("data inspect", "SOURCE --show=2"), from code of one line or of lines that end with a backslash."""
    text = re.sub(r"\\\n\s*", "", text)
    rest = r"((?:(?! #| && |\n|`).)*)"
    named = re.findall(rf"python -m rmjax\.(\w+){rest}", text)
    launched = re.findall(rf"launch/local\.sh \S+ (?:rmjax\.)?(\S+){rest}", text)
    named += [("main" if name not in COMMANDS else name, arguments) for name, arguments in launched]
    return [(f"{name} {arguments.split()[0]}" if name in PARTS else name, arguments) for name, arguments in named]


def test_the_readme_is_short_and_has_the_two_lines_of_ci():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 170
    install = [line for line in lines if line.startswith("python3 -m venv .venv && ")]
    assert [("rmjax.main" in line, "pytest" in line) for line in install] == [(True, False), (False, True)]


@pages
def test_files_and_folders_exist(page):
    paths = re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pages
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s#]+)", page.read_text())
    assert [x for x in links if not re.match(r"https?://", x) and not (page.parent / x).exists()] == []


@pages
def test_modules_and_what_they_define_exist(page):
    for name in set(re.findall(r"(?<![\w./-])rmjax(?:\.[A-Za-z_]\w*)+", page.read_text())):
        if name not in OF_OTHERS:
            pkgutil.resolve_name(name)
    assert all((ROOT / f"{name.replace('.', '/')}.py").exists() for name in OF_OTHERS)


@pages
def test_commands_have_the_flags_that_are_named(page):
    for command, arguments in commands(page.read_text()):
        for flag in re.findall(r"(?<!\S)--([\w.]+)", arguments):
            key = flag.startswith("config.") and command in ("main", "benchmark", "data audit")
            assert key or flag in flags_of(command), f"rmjax.{command} has no flag --{flag}"


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_flags_in_prose_belong_to_a_command(page):
    known = set().union(*(flags_of(command) for command in COMMANDS if command not in PARTS))
    known |= set().union(*(flags_of(f"data {part}") for part in PARTS["data"]))
    named = re.findall(r"`--([a-z_]+)(?![\w.])", page.read_text())
    assert set(named) - known == set()


@pages
def test_config_keys_exist(page):
    named = re.findall(r"(?<![\w./])config\.([a-z][\w.]*\w)", page.read_text())
    assert {key for key in named if key not in CONFIG_FILES} - config_keys() == set()


def test_commands_are_found_in_code_of_one_line_and_of_several():
    text = (
        "`python -m rmjax.data audit F --html=x`\n\n    python -m rmjax.main --config=x.py \\\n    --dry_run  # shows"
    )
    assert commands(text) == [("data audit", " audit F --html=x"), ("main", " --config=x.py --dry_run ")]
    assert commands("launch/local.sh 2 rmjax.score --x && launch/local.sh N CONFIG --y") == [
        ("score", " --x"),
        ("main", " --y"),
    ]
    assert len([command for page in PAGES for command in commands(page.read_text())]) > 30


def test_the_help_of_training_and_the_manual_name_every_section_of_the_config():
    every = [config_lib.defaults(name) for name in config_lib.OBJECTIVES]
    sections = {key for config in every for key, value in config.items() if isinstance(value, ConfigDict)}
    shown = importlib.import_module("rmjax.main").__doc__
    assert set(re.findall(r"^    ([a-z]+)  +\w", shown, re.MULTILINE)) == sections
    assert set(re.findall(r"^\| `([a-z]+)` \|", (ROOT / "docs/config.md").read_text(), re.MULTILINE)) == sections


@pytest.mark.parametrize(
    "page, names",
    [
        ("data.md", [*FORMATS, *select.FIELDS]),
        ("objectives.md", config_lib.OBJECTIVES),
        ("evaluation.md", BENCHMARKS),
        ("exit_codes.md", [str(code) for name, code in vars(exits).items() if name.isupper()]),
    ],
)
def test_tables_of_the_manual_are_complete(page, names):
    text = (ROOT / "docs" / page).read_text()
    assert [name for name in names if f"`{name}`" not in text and f"| {name} |" not in text] == []

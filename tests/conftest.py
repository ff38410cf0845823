"""Fixtures: small data and tokenizers made on the spot, and public files where they are."""

import collections
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rmjax.runtime import compile_cache

FAST = "not slow and not release"  # what addopts in pyproject.toml asks for
PUBLIC = Path(__file__).parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Tests do not depend on how they were started, and RMJAX_TESTS=slow adds the slow ones to the README's line.

    CI so collects once, and makes every shared fixture once.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts it in the background; children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("RMJAX_TESTS") == "slow" and config.option.markexpr == FAST:
        config.option.markexpr = "not release"
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist, which would begin with the files of most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker ends with one of them alone."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: slow[item.path] == 0)


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory) -> Iterator[None]:
    """A cache folder of the session's own, so that no test reads or writes the user's; one for all its workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "user-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        compile_cache.keep_programs()  # as the commands do: what several tests compile is compiled once
        yield


@pytest.fixture(scope="session")
def public_file() -> Callable[[str], Path]:
    """Where a public file is, for what is said of that file itself; the test is skipped where it is not."""

    def find(name: str) -> Path:
        if not (PUBLIC / name).exists():
            pytest.skip(f"needs the public file {name} in ../shared/data, beside the checkout")
        return PUBLIC / name

    return find


@pytest.fixture(scope="session")
def small_sets(tmp_path_factory) -> Path:
    """The folder of the files that small_sets.py makes."""
    import small_sets

    return small_sets.write(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A saved byte-level BPE that, like Qwen's, takes a run of newlines as one token, with a ChatML
    template."""
    import small_tokenizers

    return small_tokenizers.save(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session", params=["RUNS", "APART"])
def thinking_dir(request, tmp_path_factory) -> Path:
    """A saved tokenizer with a template that thinks: runs of newlines are one token, or each newline is."""
    import small_tokenizers

    pieces = getattr(small_tokenizers, request.param)
    return small_tokenizers.save(tmp_path_factory.mktemp("thinking"), small_tokenizers.THINKING, pieces)


@pytest.fixture
def tokenizer(tokenizer_dir):
    """The small tokenizer, a fresh one for each test."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))


@pytest.fixture
def environment(monkeypatch):
    """Sets variables of the environment, in which no cluster is named."""
    for name in list(os.environ):
        if name.startswith(("JAX_", "SLURM_", "OMPI_", "TPU_")) and name != "JAX_PLATFORMS":
            monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(name, str(value)) for name, value in values.items()]

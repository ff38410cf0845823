"""Fixtures: real data where it is, and a small tokenizer made on the spot."""

import collections
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from rmjax.runtime import compile_cache

FAST = "not slow and not release"  # what addopts in pyproject.toml asks for
SHARED = Path(__file__).parents[2] / "shared" / "data"

# ChatML. The role's newline stands before the content, so a response that begins with a newline merges with
# it.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "user\nWhat is a tree?\n\nA tree is a plant.\n\n",
    "assistant\nA graph without cycles is a tree too.\n\n\nsystem\nBe brief, and be kind.\n",
    "first question first answer second question second answer 0 1 2 3 4 5 6 7 8 9",
]


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
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"real data is not here ({SHARED})")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A saved byte-level BPE that, like Qwen's, takes a run of newlines as one token, with a ChatML
    template."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\s*[\r\n]+|\s?\w+|\s?[^\s\w]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "<|reserved_special_token_0|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    path = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(tokenizer_dir):
    """The small tokenizer, a fresh one for each test."""
    return transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))

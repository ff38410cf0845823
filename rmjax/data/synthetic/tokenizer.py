"""A small tokenizer for generated data, trained on the spot."""

import itertools
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rmjax.data.synthetic.pairs import pairs

VOCABULARY = 640
CHAT_TEMPLATE = r"""
{%- if tools %}
    {{- raise_exception('this template cannot describe tools') }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' ~ message.role) }}
    {%- elif message.content is not string %}
        {{- raise_exception('the ' ~ message.role ~ ' turn has no text') }}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""


def make_tokenizer(directory: str | os.PathLike[str]) -> None:
    """Trains a byte-level BPE of VOCABULARY tokens, saved for `AutoTokenizer.from_pretrained`.

    Ids 0, 1, 2 are `<|endoftext|>` (padding), `<|im_start|>` and `<|im_end|>` (end of turn); there is no BOS.
    Every word of TOPICS and FILLER is one token after a space. The chat template renders ChatML, a newline
    after each turn. The files are the same bytes each time. A new directory appears whole; in one that is
    there already each file is replaced whole.

    Normalization (NFC) and splitting are Qwen2's: transformers rebuilds Qwen2's pipeline around the
    vocabulary of any tokenizer beside a Qwen2 model, so with another the export would see other tokens than
    training saw.
    """
    from transformers import Qwen2Tokenizer  # takes seconds to import, and `rows` has no need of it

    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        _texts(), VOCABULARY, new_special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    directory = Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        built = Path(scratch) / "tokenizer"
        tokenizer.save_pretrained(built)
        try:
            built.rename(directory)
        except OSError:  # the directory is there, from a run before or another process of this one
            for file in built.iterdir():
                file.replace(directory / file.name)


def _texts() -> Iterator[str]:
    for row in itertools.islice(pairs(random.Random("pairs/0")), 2000):
        for message in (*row["prompt"], *row["chosen"], *row["rejected"]):
            yield f"{message['role']}\n{message['content']}"

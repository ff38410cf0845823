"""Small tokenizers made on the spot: byte-level BPE like Qwen's, with ChatML, and with a template that thinks."""

from pathlib import Path

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# ChatML. The role's newline stands before the content, so a response that begins with a newline merges with
# it.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's: the answer to the last question begins with its thinking, which may be empty, and earlier ones lose theirs.
THINKING = (
    "{% set last = namespace(question=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set thought, said = '', m.content %}"
    "{% if m.role == 'assistant' and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > last.question %}"
    "{% set said = '<think>\n' + thought + '\n</think>\n\n' + said.lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "user\nWhat is a tree?\n\nA tree is a plant.\n\n",
    "assistant\nA graph without cycles is a tree too.\n\n\nsystem\nBe brief, and be kind.\n",
    "first question first answer second question second answer 0 1 2 3 4 5 6 7 8 9",
]
RUNS = r"\s*[\r\n]+|\s?\w+|\s?[^\s\w]+|\s+"  # a run of newlines is one token, as in Qwen's
APART = r"[\r\n]|[^\S\r\n]?\w+|[^\S\r\n]?[^\s\w]+|[^\S\r\n]+"  # each newline is a token


def save(path: Path, template: str = CHATML, pieces: str = RUNS) -> Path:
    """Saves a tokenizer whose tokens are parts of `pieces`; returns its folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pieces), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
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
    fast.chat_template = template
    fast.save_pretrained(path)
    return path

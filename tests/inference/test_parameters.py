"""A config becomes a model: what is checked before there are parameters."""

import pytest

from rmjax.batches.chat import load_tokenizer
from rmjax.config import demo
from rmjax.data import synthetic
from rmjax.inference import parameters


def test_tokens_without_a_row_in_the_embedding_are_named(tmp_path):
    synthetic.make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    rows = len(tokenizer)
    assert parameters.tokens_without_row(tokenizer, rows) == parameters.tokens_without_row(tokenizer, rows + 64) == ""
    tokenizer.add_tokens(["<mine>", "[PAD]"], special_tokens=True)
    config = demo()
    assert parameters.model_values(config, tokenizer)["vocab_size"] == rows + 2
    with config.unlocked():
        config.model.scratch.vocab_size = rows
    said = f"has {rows + 2} ids but the model's embedding {rows} rows, so that '<mine>', '\\[PAD\\]' have none: call "
    with pytest.raises(ValueError, match=rf"{said}resize_token_embeddings\({rows + 2}\) .*config\.model\.tokenizer"):
        parameters.model_values(config, tokenizer)

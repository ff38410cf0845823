"""A tiny model, and the score command with it."""

import pytest
import tiny_models
import transformers

from rmjax.inference.reward_model import RewardModel


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer_dir):
    """A tiny model, not made by rmjax."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "num_hidden_layers": 1}
    tiny_models.make_hf_model("llama", directory, **sizes)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def loaded(model_dir):
    return RewardModel.load(model_dir)


@pytest.fixture
def fast(monkeypatch, loaded):
    """The command finds the model loaded already."""
    monkeypatch.setattr("rmjax.inference.reward_model.load_checked", lambda *_args, **_kwargs: loaded)

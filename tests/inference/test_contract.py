"""The score contract of every kind of export: replayed by us and by transformers, and what makes it fail."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

from rmjax import objectives
from rmjax.batches.chat import Chat, load_tokenizer
from rmjax.config import defaults
from rmjax.data import synthetic
from rmjax.export import verify, vllm_replay
from rmjax.export import write as export
from rmjax.inference import contract
from rmjax.inference.reward_model import load_checked
from rmjax.models import config as model_config
from rmjax.models import heads

KINDS = {"bradley_terry": "SequenceClassification", "prm": "TokenClassification", "sft": "CausalLM"}
SAID = ("Every river is deep.", "The garden is old, and so is the lake.", "No.")
TALKS = [[{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": text}] for text in SAID]
INTERVAL = {"value": 3.0, "low": 2.0, "high": None}
MEASURED = {
    **{"step": 4.0, "validation/reward_mean": 0.5, "validation/reward_std": 2.0, "validation/margin": 3.0},
    **{"validation/chosen_p05": 4.0, "validation/loss": 0.7, "validation/reward_length_correlation": 0.1},
}
REPLAYS = [load_checked, verify.verify]


def random_params(shapes, seed=0):
    """Parameters of these shapes, none of them zero."""
    rng = np.random.default_rng(seed)
    value = lambda path, x: 0.2 * rng.standard_normal(x.shape) + ("scale" in jax.tree_util.keystr(path))
    return jax.tree_util.tree_map_with_path(lambda path, x: value(path, x).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A function that exports a random model of two layers of an objective."""
    tokenizer = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    synthetic.make_tokenizer(tokenizer)

    def made(directory, name, **options):
        chat, config = Chat(load_tokenizer(tokenizer)), defaults(name)
        values = {**tiny_models.SIZES, "model_type": "qwen2", "num_hidden_layers": 2, "tie_word_embeddings": True}
        values["vocab_size"] = len(chat.tokenizer)
        objective, model = objectives.make(config.objective), model_config.from_hf(values)
        outputs = len(objective.labels)
        _, shapes = heads.abstract(model, outputs, "float32", "float32", architecture=objective.architecture)
        ids = chat.encode([chat.render(talk) for talk in TALKS])
        export.write_export(
            directory,
            random_params(shapes),
            objective=objective,
            config=config,
            values=values,
            model=model,
            chat=chat,
            metrics=MEASURED,
            data="0",
            golden=[(row, [5, len(row) - 1] if name == "prm" else [len(row) - 1]) for row in ids],
            evaluation={
                "sets": {"validation": {"metrics": {"margin": INTERVAL, "accuracy": INTERVAL}}},
                "benchmarks": {},
            },
            **options,
        )
        return directory

    return made


@pytest.fixture(scope="module")
def exports(write, tmp_path_factory):
    """An export of each kind."""
    return {name: write(tmp_path_factory.mktemp(name) / "export", name) for name in KINDS}


@pytest.fixture
def copied(exports, tmp_path):
    """A function that copies an export, to spoil it."""
    return lambda name="bradley_terry": shutil.copytree(exports[name], tmp_path / name)


def with_weights(directory, change):
    """Changes each tensor by a function of its name and values."""
    path = directory / "model.safetensors"
    changed = {name: change(name, tensor).astype(tensor.dtype) for name, tensor in load_file(path).items()}
    save_file(changed, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", KINDS)
def test_transformers_replays_it_and_that_is_recorded(name, copied):
    directory = copied(name)
    before = contract.read(directory)
    lines = verify.verify(directory)
    told = contract.read(directory).pop("verified")
    assert [x["by"].partition(" ")[0] for x in told] == ["rmjax", "transformers"]
    assert all(0 <= x["largest_difference"] <= contract.TOLERANCE for x in told)
    assert len(lines) == 2 + len(before["golden"]) == 6 and "largest difference" in lines[0]
    assert {k: v for k, v in contract.read(directory).items() if k != "verified"} == before
    assert [path.name for path in directory.glob(".*")] == [".rmjax.json"]
    load_checked(directory)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("replay", REPLAYS)
def test_a_weight_that_is_one_percent_off_is_noticed(replay, name, copied):
    directory = copied(name)
    with_weights(directory, lambda key, x: x * 1.01 if key == "model.layers.1.self_attn.v_proj.weight" else x)
    with pytest.raises(ValueError, match=r"parameter decoder/\S*v/kernel has another norm than in the score contract"):
        replay(directory)
    assert "verified" not in contract.read(directory)


def test_so_is_each_of_them(copied):
    directory = copied()
    whole = (directory / "model.safetensors").read_bytes()
    names = list(load_file(directory / "model.safetensors"))
    assert len(names) == 1 + 2 * 12 + 2  # embedding; of each layer projections, biases and norms; norm, head
    for name in names:
        (directory / "model.safetensors").write_bytes(whole)
        with_weights(directory, lambda key, x, name=name: x * 1.01 if key == name else x)
        with pytest.raises(ValueError, match="has another norm than in the score contract"):
            load_checked(directory)
    (directory / "model.safetensors").write_bytes(whole)
    load_checked(directory)


@pytest.mark.parametrize("name", KINDS)
def test_golden_rows_notice_what_keeps_every_norm(name, copied):
    directory = copied(name)
    turned = "model.embed_tokens.weight" if name == "sft" else "score.weight"
    with_weights(directory, lambda key, x: x[..., ::-1].copy() if key == turned else x)
    for replay in REPLAYS:
        with pytest.raises(ValueError, match="golden row 0 scores"):
            replay(directory)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("replay", REPLAYS)
def test_one_character_of_the_template_is_noticed(replay, name, copied):
    directory = copied(name)
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_end|> ", 1))
    with pytest.raises(ValueError, match="the tokenizer's chat template is not the one it was trained with"):
        replay(directory)


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("tokenizer_config.json", "pad_token", "<|im_start|>", "the tokenizer's pad_token_id is 1, it was 0"),
        ("tokenizer_config.json", "eos_token", "<|im_start|>", "the tokenizer's eos_token_id is 1, it was 2"),
        ("tokenizer_config.json", "bos_token", "<|im_start|>", "the tokenizer's bos_token_id is 1, it was None"),
        ("config.json", "pad_token_id", 1, "config.json has pad_token_id 1, it was 0"),
        ("config.json", "pad_token_id", None, "config.json has pad_token_id None, it was 0"),
    ],
)
@pytest.mark.parametrize("replay", REPLAYS)
def test_another_special_token_is_noticed(replay, file, key, value, said, copied):
    directory = copied()
    values = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps({**values, key: value}))
    with pytest.raises(ValueError, match=said):
        replay(directory)


def test_others_that_disagree_are_named_and_nothing_is_recorded(copied, monkeypatch):
    directory = copied()
    before = (directory / contract.FILE).read_bytes()
    off = lambda directory, golden: [np.array(row["outputs"]) + 2 * contract.TOLERANCE for row in golden]
    monkeypatch.setattr(verify, "other_replays", lambda *asked: {"another 1.0": off})
    with pytest.raises(ValueError, match=r"another 1\.0 disagrees with the export's contract: golden row 0 scores"):
        verify.verify(directory)
    assert (directory / contract.FILE).read_bytes() == before


def test_what_cannot_be_verified_says_why(tmp_path, copied, monkeypatch):
    with pytest.raises(ValueError, match="it is no export of ours"):
        verify.verify(tmp_path)
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install .*torch"):
        verify.verify(copied())


@pytest.mark.parametrize("name", KINDS)
def test_vllm_is_asked_about_sequence_classifiers_where_it_is_installed(name, copied, monkeypatch):
    """vLLM itself is not here; tests/export/test_vllm_replay.py shows what its process is asked."""
    directory = copied(name)
    golden = {tuple(row["token_ids"]): np.array(row["outputs"]) for row in contract.read(directory)["golden"]}
    asked = []

    def replay(directory, rows):
        asked.append(directory)
        return [golden[tuple(ids)] for ids in rows]

    found, version = importlib.util.find_spec, verify.version_of
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "vllm" else found(name))
    monkeypatch.setattr(verify, "version_of", lambda name: "0.1" if name == "vllm" else version(name))
    monkeypatch.setattr(vllm_replay, "replay", replay)
    verify.verify(directory)
    by = [x["by"].partition(" ")[0] for x in contract.read(directory)["verified"]]
    assert by == ["rmjax", "transformers", *["vllm"] * bool(asked)]
    assert asked == [directory] * (name == "bradley_terry")


# Rewards of unit deviation


def test_unit_deviation_is_in_the_head_and_in_the_contract(write, exports, tmp_path):
    before, after = (
        contract.read(exports["bradley_terry"]),
        contract.read(write(tmp_path / "x", "bradley_terry", unit_std=True)),
    )
    for ours, scaled in zip(before["golden"], after["golden"], strict=True):
        np.testing.assert_allclose(np.array(scaled["outputs"]) * 2, ours["outputs"], rtol=1e-5)
    assert (after["reward_mean"], after["reward_std"], after["reward_scale"]) == (0.25, 1, 2)
    halved = {"reward_mean": 0.25, "reward_std": 1.0, "margin": 1.5, "chosen_p05": 2.0}
    assert after["metrics"] == {**MEASURED, **{f"validation/{name}": value for name, value in halved.items()}}
    assert after["estimates"]["validation/margin"] == {"value": 1.5, "low": 1.0, "high": None}
    assert after["estimates"]["validation/accuracy"] == INTERVAL
    assert "divided by 2; the log-odds" in after["decoding"]
    verify.verify(tmp_path / "x")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": {"name": "prm"}}, "of this prm model have a scale that decoding knows"),
        ({"objective_params": {"tie": 0.0}}, "without a learnt tie parameter"),
        ({"reward_std": None}, "it was not evaluated"),
        ({"reward_std": 0.0}, "one of 0"),
    ],
)
def test_what_has_no_unit_is_refused(changes, said, exports):
    with pytest.raises(ValueError, match=said):
        export.scaled({}, {**contract.read(exports["bradley_terry"]), **changes})

"""Averages of exports: the mean of every weight, one contract, and models that do not fit together are refused."""

import json

import numpy as np
import pytest
import tiny_exports
from safetensors.numpy import load_file
from tiny_exports import TALK

from rmjax.data import synthetic
from rmjax.export import __main__ as command
from rmjax.inference import contract
from rmjax.inference.reward_model import RewardModel, load_checked


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A function that exports a random model of one layer."""
    tokenizer = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    synthetic.make_tokenizer(tokenizer)

    def made(name, seed=0, kind="bradley_terry", template="", unit_std=False, **sizes):
        objective = {"ties": "skip" if unit_std else "davidson"} if kind == "bradley_terry" else {}
        more = {"kind": kind, "template": template, "unit_std": unit_std, "objective": objective}
        return tiny_exports.write(tmp_path_factory.mktemp(name) / "export", tokenizer, seed, **more, **sizes)

    return made


@pytest.fixture(scope="module")
def three(make):
    return [make(f"m{seed}", seed) for seed in (1, 2, 3)]


def run(*models, output, more=()):
    command.main([f"--average={','.join(map(str, models))}", f"--output={output}", *more])


def test_every_weight_is_the_mean(three, tmp_path, capsys):
    run(*three, output=tmp_path / "average")
    assert "it was not evaluated" in capsys.readouterr().out
    weights = [load_file(place / "model.safetensors") for place in (*three, tmp_path / "average")]
    for name, found in weights[-1].items():
        np.testing.assert_allclose(found, np.mean([x[name] for x in weights[:3]], 0), atol=1e-6)
    model = load_checked(tmp_path / "average")  # replays its golden rows
    terms, of_one = contract.read(tmp_path / "average"), contract.read(three[0])
    assert terms["reward_mean"] is None and terms["metrics"] == {} and terms["data_fingerprint"] == "of 1 + of 2 + of 3"
    assert terms["objective_params"] == dict.fromkeys(of_one["objective_params"], 2.0) != {}
    assert len(terms["golden"]) == 2 and terms["max_length"] == of_one["max_length"]
    scores = [RewardModel.load(place).score([TALK])[0] for place in three]
    assert model.score([TALK])[0] != pytest.approx(np.mean(scores), abs=1e-3)  # weights are averaged, not scores


def test_an_average_of_equal_models_is_that_model(three, tmp_path):
    run(three[0], three[0], output=tmp_path / "average", more=["--dtype=bfloat16"])
    scores = [RewardModel.load(place).score([TALK])[0] for place in (three[0], tmp_path / "average")]
    assert scores[1] == pytest.approx(scores[0], abs=0.05)  # its weights are rounded


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"intermediate_size": 64}, "they differ in the model's shapes"),
        ({"kind": "pairwise"}, "they differ in objective"),
        ({"template": "{# other #}"}, "they differ in template_sha256"),
        ({"unit_std": True}, "--unit_std"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_weights_are_read(options, words, three, make, tmp_path, capsys):
    other = make("other", **options)
    (other / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as error:
        run(three[0], other, output=tmp_path / "average")
    assert error.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "average").exists()


def test_bad_flags_are_named(three, tmp_path, capsys):
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    for models, more, words in (
        (three[:1], [], "two exports or more"),
        (three[:2], ["--unit_std"], "leave the other flags out"),
        ([three[0], plain], [], "has no score contract"),
        ([three[0], tmp_path / "nowhere"], [], "nowhere"),
    ):
        with pytest.raises(SystemExit) as error:
            run(*models, output=tmp_path / "average", more=more)
        assert error.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(*three[:2], output=three[0])
    assert "is one of the models" in capsys.readouterr().err

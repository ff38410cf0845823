"""How models are asked about preferences: rewards, judges of both orders, likelihoods of verdicts against torch."""

import json

import jax
import numpy as np
import pytest
import tiny_models
import transformers

from rmjax import sharding
from rmjax.batches.chat import Chat, load_tokenizer
from rmjax.batches.tasks import Preferences
from rmjax.batches.trees import build_tree, parts
from rmjax.config import defaults
from rmjax.evaluate import asking, evaluating, measures
from rmjax.inference.reward_model import Kind, RewardModel
from rmjax.judging.questions import Ratings, Verdicts
from rmjax.judging.verdicts import VERDICTS
from rmjax.models import heads, hf
from rmjax.models.config import from_hf
from rmjax.objectives import make

ROWS = [  # ranked: three responses, two equally good; two of another prompt; one of each of several lengths
    {"prompt": "What is a tree?", "responses": ["A plant.", "A graph.", "0 1 2 3 4 5"], "ranks": [1, 2, 2]},
    {"prompt": "Be kind.", "responses": ["first answer", "second answer, and a longer one"], "ranks": [2, 1]},
    {"prompt": "first question " * 12, "responses": ["be brief", "4 5"], "ranks": [1, 1]},
]


def objective(name, **keys):
    return make({**defaults(name).objective.to_dict(), **keys})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_dir):
    """A tiny language model of transformers with a tokenizer, and the model itself."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    model = tiny_models.make_hf_model("qwen2", directory, head=False, **sizes)
    tokenizer.save_pretrained(directory)
    return directory, model


def loaded(directory, what, own=None):
    """A RewardModel of an objective with this base; a new head is random."""
    config = from_hf(hf.read_config(directory))
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.local_devices()[:1])
    _, shapes = heads.abstract(config, len(what.labels), "float32", "float32", architecture=what.architecture)
    shapes = sharding.with_shardings(shapes, sharding.param_shardings(mesh, shapes))
    params, _ = hf.load(directory, shapes, config, seed=1)
    if "score" in params:
        params["score"]["kernel"] = params["score"]["kernel"] * 20  # so that rewards differ
    return RewardModel(Chat(load_tokenizer(directory)), config, params, mesh, "float32", Kind.trained(what, own or {}))


def asked(model, rows, tmp_path):
    task = asking.task_for(model.objective.task)
    groups = evaluating.read(rows, model.chat, task, cache_dir=tmp_path, workers=0)
    return groups, task, asking.ask(model, groups)


def test_a_reward_model_gives_each_response_its_score(base, rows, tmp_path):
    model = loaded(base[0], objective("bradley_terry"))
    _, task, said = asked(model, rows, tmp_path)
    assert isinstance(task, Preferences) and len(said) == 3
    for row, group in zip(ROWS, said):
        conversations = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
            for text in row["responses"]
        ]
        alone = [model.score([conversation])[0] for conversation in conversations]
        np.testing.assert_allclose(group.scores, alone, atol=1e-5)
        tokens = [len(model.chat.encode([model.chat.render(c)])[0]) for c in conversations]
        assert group.tokens.tolist() == tokens
    assert said[0].wins.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0]] and said[0].ties[1, 2] == 1
    order = np.argsort(-said[0].scores)
    assert said[0].alone.verdicts[0][order[0], order[1]] == 1 and said[0].alone.verdicts[0][order[1], order[0]] == 0
    assert said[0].alone.preference[0][0, 1] == pytest.approx(1 / (1 + np.exp(said[0].scores[1] - said[0].scores[0])))


def test_a_pairwise_judge_is_asked_in_both_orders(base, rows, tmp_path):
    model = loaded(base[0], objective("pairwise"))
    groups, _, said = asked(model, rows, tmp_path)
    assert len(groups) == 5 and [group.wins.shape[0] for group in said] == [3, 2, 2]  # three pairs of three responses
    turn = lambda text: {"role": "assistant", "content": text}
    for row, group in zip(ROWS, said):
        prompt = {"role": "user", "content": row["prompt"]}
        for i, j in ((0, 1), (1, 0)):
            averaged = model.judge([[prompt, turn(row["responses"][i])]], [[prompt, turn(row["responses"][j])]])[0]
            np.testing.assert_allclose(group.alone.averaged[0][i, j], list(averaged.values()), atol=1e-5)
    assert np.isnan(said[0].orders[0, 0]).all() and np.isnan(said[0].alone.verdicts[0][1, 1])
    assert said[2].ties[0, 1] == 1 and not said[2].wins.any()
    np.testing.assert_allclose(said[0].alone.preference[0][0, 1] + said[0].alone.preference[0][1, 0], 1, atol=1e-6)


def log_likelihood(model, tokens, start):
    """Of the tokens from `start` on, by transformers."""
    import torch

    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = torch.log_softmax(model(ids).logits[0].double(), -1)
    return sum(float(logits[t - 1, tokens[t]]) for t in range(start, len(tokens)))


def test_verdicts_of_a_judge_that_writes_are_as_likely_as_torch_says(base, rows, tmp_path):
    model = loaded(base[0], objective("sft", target="pair"))
    _, task, said = asked(model, rows, tmp_path)
    assert isinstance(task, Verdicts)
    record = next(r for r in _records(rows))
    for swapped, (i, j) in enumerate(((0, 1), (1, 0))):
        example = task.examples(record)[0]
        texts = [model.chat.render(c) for c in example.conversations[3 * swapped : 3 * swapped + 3]]
        tokens = model.chat.encode(texts)
        shared = next(n for n, column in enumerate(zip(*tokens)) if len(set(column)) > 1)
        likely = np.array([log_likelihood(base[1], list(x), shared) for x in tokens])
        expected = np.exp(likely - likely.max()) / np.exp(likely - likely.max()).sum()
        np.testing.assert_allclose(said[0].orders[i, j], expected, atol=2e-5)
    assert len(VERDICTS) == 3


def _records(rows):
    from rmjax.data.reading import records

    return records(rows)


def test_ratings_of_a_judge_that_writes_are_the_mean_over_their_likelihoods(base, rows, tmp_path):
    model = loaded(base[0], objective("sft", target="score", scale=(1.0, 3.0)))
    _, task, said = asked(model, rows, tmp_path)
    assert isinstance(task, Ratings) and task.ratings == (1, 2, 3)
    example = task.examples(next(r for r in _records(rows)))[0]
    tokens = model.chat.encode([model.chat.render(c) for c in example.conversations])
    for k in range(3):
        mine = tokens[3 * k : 3 * k + 3]
        shared = next(n for n, column in enumerate(zip(*mine)) if len(set(column)) > 1)
        likely = np.array([log_likelihood(base[1], list(x), shared) for x in mine])
        share = np.exp(likely - likely.max()) / np.exp(likely - likely.max()).sum()
        assert said[0].scores[k] == pytest.approx(share @ [1, 2, 3], abs=1e-4)
    assert said[0].wins.shape == (3, 3) and said[0].wins[0].tolist() == [0, 1, 1]


def test_who_cannot_be_asked_is_told_why():
    with pytest.raises(ValueError, match="scores steps"):
        asking.task_for(objective("prm").task)
    with pytest.raises(ValueError, match="writes conversations"):
        asking.task_for(objective("sft").task)
    with pytest.raises(ValueError, match="gives no single score"):
        asking.task_for(objective("sft", target="score", attributes=("a", "b")).task)
    assert asking.task_for(None) == Preferences("keep")


def test_a_tree_in_parts_has_the_same_sequences_and_scores(base):
    rng = np.random.default_rng(0)
    shared = rng.integers(5, 90, 20).tolist()
    sequences = [shared + rng.integers(5, 90, n).tolist() for n in (3, 9, 1, 14, 30)]
    tree = build_tree(sequences)
    for most in (10, 35, 60, 1000):
        split = parts(tree, most)
        assert [s.tolist() for part in split for s in part.sequences()] == sequences
        assert all(len(part) <= most or len(part.end) == 1 for part in split) and (len(split) == 1) == (most == 1000)
    model = loaded(base[0], objective("bradley_terry"))
    whole, split = model.inference.trees([tree])[0], model.inference.trees(parts(tree, 60))
    np.testing.assert_allclose(np.concatenate(split), whole, atol=1e-5)


def test_the_texts_of_a_pair_are_readable(base, rows, tmp_path):
    model = loaded(base[0], objective("bradley_terry"))
    groups = evaluating.read(rows, model.chat, Preferences("keep"), cache_dir=tmp_path, workers=0)
    names = {groups.id(n): n for n in range(len(groups))}
    entry = {"id": groups.id(1), "preferred": 1, "rejected": 0}
    found = evaluating._texts(model.chat, groups, names, entry, True)
    assert found["prompt"].endswith("assistant") and "Be kind." in found["prompt"]
    assert found["preferred_text"].startswith("second answer, and") and found["rejected_text"].startswith(
        "first answer"
    )


def test_scaled_rewards_mean_the_same_probabilities(base, rows, tmp_path):
    """An export with --unit_std: scores are divided, and its contract says by what."""
    model = loaded(base[0], objective("bradley_terry"))
    *_, plain = asked(model, rows, tmp_path)
    scaled = loaded(base[0], objective("bradley_terry"))
    scaled.inference.params["score"]["kernel"] = model.params["score"]["kernel"] / 4
    scaled.contract = {"reward_scale": 4.0}
    *_, divided = asked(scaled, rows, tmp_path)
    np.testing.assert_allclose(divided[0].scores * 4, plain[0].scores, atol=1e-5)
    np.testing.assert_allclose(divided[0].alone.preference, plain[0].alone.preference, atol=1e-6)
    before, after = (measures.preferences(said)["metrics"] for said in (plain, divided))
    for name in ("accuracy", "nll", "ece"):
        assert after[name]["value"] == pytest.approx(before[name]["value"], abs=1e-5), name
    assert after["margin"]["value"] == pytest.approx(before["margin"]["value"] / 4, abs=1e-5)

"""Ensembles of tiny models: combined rewards and spreads by hand, in Python and in the three commands."""

import asyncio
import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import tiny_exports
from made_up_answers import pairs
from sklearn.metrics import roc_auc_score

import rmjax
from rmjax import objectives
from rmjax.evaluate import __main__ as evaluate
from rmjax.evaluate import measures
from rmjax.inference import engine, ensembles
from rmjax.inference.reward_model import BadConversation, Kind, RewardModel
from rmjax.runtime import notes
from rmjax.score import __main__ as score
from rmjax.score.making import Options
from rmjax.serve import __main__ as serve
from rmjax.serve import app

BY_HAND = {  # of rewards [n, M], by nothing but sums and sorting
    "mean": lambda x: x.sum(1) / x.shape[1],
    "min": lambda x: np.sort(x, 1)[:, 0],
    "mean_minus_std": lambda x: x.sum(1) / x.shape[1] - by_hand_spread(x),
    "median": lambda x: np.sort(x, 1)[:, x.shape[1] // 2],  # of three
}
SCALES = np.array([1.0, 1.5, -3.0]), np.array([2.0, 2.5, 4.5])  # means and deviations of three models
WORDS = ["A plant.", "0 1 2 3", "yes", "A graph without cycles."]
TALKS = [
    [{"role": "user", "content": f"What is a tree{n // 2}?"}, {"role": "assistant", "content": WORDS[n % 4]}]
    for n in range(6)
]
ROW = {"prompt": "What is a tree?", "responses": WORDS}


def by_hand_spread(x):
    """The population standard deviation."""
    return np.sqrt(((x - x.sum(1, keepdims=True) / x.shape[1]) ** 2).sum(1) / x.shape[1])


@pytest.fixture(scope="module")
def make(tmp_path_factory, tokenizer_dir):
    """A function that exports a random model of one layer."""
    return lambda seed, **options: tiny_exports.write(
        tmp_path_factory.mktemp(f"m{seed}") / "export", tokenizer_dir, seed, **options
    )


@pytest.fixture(scope="module")
def three(make):
    """Exports, of which two are of one architecture, and one has rewards on a scale of its own."""
    scales = [(mean, std) for mean, std in zip(*SCALES)]
    return [make(1, scale=scales[0]), make(2, scale=scales[1]), make(3, scale=scales[2], intermediate_size=64)]


@pytest.fixture(scope="module")
def rewards(three):
    """Rewards [n, M] of TALKS, by each model alone."""
    return np.stack([RewardModel.load(place).score(TALKS) for place in three], 1)


@pytest.fixture
def told(monkeypatch):
    """What is warned of."""
    lines = []
    monkeypatch.setattr(notes, "tell", lines.append)
    return lines


def listed(models):
    return ",".join(map(str, models))


@pytest.mark.parametrize("combine", ensembles.COMBINATIONS)
def test_rewards_are_combined_as_by_hand(combine, three, rewards):
    model = rmjax.Ensemble.load(three, combine=combine)
    values = model.values(TALKS)
    np.testing.assert_allclose(values["score"], BY_HAND[combine](rewards), atol=1e-5)
    np.testing.assert_allclose(values["spread"], by_hand_spread(rewards), atol=1e-5)
    assert model.score(TALKS) == values["score"].tolist() and model.title == f"{combine} of 3"
    ids = model.chat.encode([model.chat.render(talk) for talk in TALKS])
    np.testing.assert_allclose(model.score_tokens(ids), values["score"], atol=1e-5)
    np.testing.assert_allclose(model.outputs(ids)[:, ensembles.MEMBERS :], rewards, atol=1e-5)
    assert model.outputs([]).shape == (0, 2 + len(three))


def test_normalized_members_are_each_on_the_scale_of_their_contract(three, rewards, told):
    model = rmjax.Ensemble.load(three, combine="min", normalize=True)
    own = (rewards - SCALES[0]) / SCALES[1]
    np.testing.assert_allclose(model.score(TALKS), own.min(1), atol=1e-5)
    np.testing.assert_allclose(model.values(TALKS)["spread"], by_hand_spread(own), atol=1e-5)
    assert not told and model.contract["reward_scale"] == SCALES[1].mean()
    assert model.resolution == max(member.resolution / std for member, std in zip(model.members, SCALES[1]))


def test_rewards_on_unlike_scales_are_told_of(three, told):
    rmjax.Ensemble.load(three[:2])
    assert not told
    ensembles.load_checked(three, "min")
    (line,) = told
    assert f"the rewards of {three[0]} are 1 ± 2 in validation, those of {three[2]} -3 ± 4.5" in line
    assert "--normalize" in line


def test_members_of_one_architecture_share_a_program_and_the_counts(three):
    model = rmjax.Ensemble.load(three[:2])
    model.values(TALKS)
    engine._forward.clear_cache()
    one, both = RewardModel.load(three[0]), rmjax.Ensemble.load(three[:2])
    one.values(TALKS)
    compiled = engine._forward._cache_size()
    both.values(TALKS)
    assert engine._forward._cache_size() == compiled == 1
    assert both.inference.work.computed == 2 * one.inference.work.computed > 0


def test_what_cannot_be_scored_is_named_once(three):
    model = rmjax.Ensemble.load(three)
    with pytest.raises(BadConversation, match="conversation 1") as bad:
        model.values([TALKS[0], TALKS[0][:1]])
    assert bad.value.index == 1
    for ask in (lambda: model.judge(TALKS, TALKS), lambda: model.steps([TALKS[0][:1]], [["a"]])):
        with pytest.raises(ValueError, match="call `score`"):
            ask()


# Models that do not fit together


@pytest.mark.parametrize(
    ("models", "combine", "says"),
    [
        (["a", "b"], "meen", "--combine=meen is none of mean, min, mean_minus_std, median; did you mean 'mean'?"),
        (["a"], "min", "--combine=min is for several models, separated by commas; --model names a"),
        ([], "min", "--model names none"),
        (["a", "b", "a"], "", "--model names a twice"),
    ],
)
def test_combinations_that_mean_nothing(models, combine, says):
    with pytest.raises(ValueError) as error:
        ensembles.combination(models, combine)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model=a,b", "--combine=meen"], "did you mean 'mean'?"),
        (["--model=a", "--combine=min"], "--combine=min is for several models"),
        (["--model=a,b", "--normalize"], "--normalize goes with --combine"),
        (["--model=a,b", "--combine=min", "--samples=8"], "--samples is for judges that write"),
    ],
)
def test_flags_of_evaluate_that_do_not_go_together(flags, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        evaluate.checked(evaluate.parser().parse_args([*flags, "--data=synthetic://pairs?n=4&seed=1"]))


def test_names_of_models(tmp_path, monkeypatch):
    (tmp_path / "a,b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ensembles.named_models("a,b") == ["a,b"] and ensembles.named_models("a, c,") == ["a", "c"]
    (tmp_path / "a").symlink_to("a,b")
    with pytest.raises(ValueError, match="twice"):
        ensembles.combination([tmp_path / "a", "a,b"], "mean")
    assert ensembles.combination(["a"], "") == "" and ensembles.combination(["o/a", "o/b"], "") == "mean"


def test_models_that_do_not_fit_are_told_apart_before_weights_are_read(three, make, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(three[1], other)
    (other / "model.safetensors").unlink()
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# other #}")
    with pytest.raises(ValueError) as error:
        rmjax.Ensemble.load([three[0], other])
    assert f"{other} and {three[0]} cannot be one ensemble, they differ in the chat template" in str(error.value)
    several = make(5, kind="pointwise", objective={"attributes": ("good", "true"), "scales": (0, 4)})
    with pytest.raises(ValueError, match=f"{several} gives good, true; an ensemble is of models"):
        rmjax.Ensemble.load([three[0], several])
    (other / "reward_contract.json").unlink()
    shutil.copy(three[1] / "chat_template.jinja", template)
    with pytest.raises(ValueError, match=f"{other}: rewards cannot be normalized: the model has no score contract"):
        rmjax.Ensemble.load([three[0], other], normalize=True)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ({"name": "pairwise"}, "is a judge that compares two responses"),
        ({"name": "sft"}, "is a judge that writes its verdicts"),
        ({"name": "prm"}, "scores steps, not whole responses"),
        ({"name": "pointwise", "attributes": ["a", "b"], "scales": [0, 4]}, "gives a, b"),
        ({"name": "pointwise", "attributes": ["a"], "scales": [0, 4]}, "their objectives differ: pointwise and brad"),
    ],
)
def test_objectives_that_do_not_fit(kind, says, three):
    plain, other = (Kind.trained(objectives.make(x), {}) for x in ({"name": "bradley_terry"}, kind))
    chat = SimpleNamespace(identity=dict)
    ensembles._require_alike(["x", "z"], [plain, plain], [chat] * 2)
    with pytest.raises(ValueError, match=f"y .*{says}"):
        ensembles._require_alike(["x", "y"], [plain, other], [chat] * 2)


# What tells errors


def test_areas_of_errors_against_scikit_learn():
    rng, groups, sign, wrong = np.random.default_rng(0), [], [], []
    for g in pairs(300):
        members = g.scores[:, None] + rng.normal(size=(2, 4)) * (1 + (rng.random() < 0.3))
        groups.append(dataclasses.replace(g, scores=members.mean(1), members=members))
        chosen = int(g.wins[1, 0] > g.wins[0, 1])
        difference = members[chosen] - members[1 - chosen]
        sign.append((-abs(difference.mean()), members.std(1).mean(), difference.std()))
        wrong.append(difference.mean() < 0)
    equal = dataclasses.replace(groups[0], scores=np.zeros(2), id="equal")  # neither right nor wrong
    metrics = measures.preferences([*groups, equal])["metrics"]
    for name, x in zip(("margin", "spread", "margin_spread"), np.transpose(sign)):
        found = metrics[f"error_auc_{name}"]
        assert (
            found["value"] == pytest.approx(roc_auc_score(wrong, x)) and found["low"] < found["value"] < found["high"]
        )
    of_one = measures.preferences([dataclasses.replace(g, members=None) for g in groups])["metrics"]
    assert not any(name.startswith("error_auc") for name in of_one)
    right = [g for g, bad in zip(groups, wrong) if not bad]
    assert measures.preferences(right)["metrics"]["error_auc_spread"]["value"] is None


# The commands


def test_score_writes_the_combined_reward_and_its_spread(three, tmp_path, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(ROW) + "\n")
    own = np.stack([RewardModel.load(place).score(_talks(ROW)) for place in three], 1)
    score.run(listed(three), str(source), out)
    printed = capsys.readouterr().out
    assert f"rewards are the mean of 3 models (--combine=mean): {', '.join(map(str, three))}" in printed
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(row) == [*ROW, "scores", "spread"]
    np.testing.assert_allclose(row["scores"], own.mean(1), atol=1e-5)
    np.testing.assert_allclose(row["spread"], own.std(1), atol=1e-5)
    score.run(listed(three), str(source), out, combine="min", options=Options(best_of_n=True))
    (best,) = [json.loads(line) for line in out.read_text().splitlines()]
    at = int(own.min(1).argmax())
    assert best["response"] == WORDS[at] and best["score"] == pytest.approx(own.min(1)[at], abs=1e-5)
    assert best["spread"] == pytest.approx(own.std(1)[at], abs=1e-5)
    pair = tmp_path / "pair.jsonl"
    pair.write_text(json.dumps({"prompt": "q", "chosen": "yes", "rejected": "no"}) + "\n")
    score.run(listed(three), str(pair), out)
    added = ["chosen_score", "rejected_score", "chosen_spread", "rejected_spread"]
    assert sorted(json.loads(out.read_text())) == sorted(["prompt", "chosen", "rejected", *added])


def _talks(row):
    turns = lambda text: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
    return [turns(text) for text in row["responses"]]


def test_evaluate_puts_the_ensemble_beside_its_members(three, tmp_path, capsys):
    out, data = tmp_path / "found.json", "synthetic://pairs?n=40&seed=1"
    evaluate.main([f"--model={listed(three)}", "--combine=median", f"--data={data}", f"--output={out}"])
    printed = capsys.readouterr().out
    assert "median of 3" in printed and "Errors told by" in printed
    whole, *members = json.loads(out.read_text())["models"]
    assert whole["model"] == "median of 3" and whole["members"] == list(map(str, three)) == [
        x["model"] for x in members
    ]
    evaluate.main([f"--model={listed(three)}", f"--data={data}", f"--output={out}"])
    assert [x["sets"] for x in json.loads(out.read_text())["models"]] == [x["sets"] for x in members]
    metrics = [x["sets"]["pairs"]["metrics"] for x in (whole, *members)]
    assert all(x["accuracy"]["value"] is not None and x["ece"]["value"] is not None for x in metrics)
    assert "error_auc_spread" in metrics[0] and "error_auc_spread" not in metrics[1]


def test_serve_answers_with_the_spread_beside_the_reward(three, capsys):
    args = serve.parser().parse_args([f"--model={listed(three)}", "--combine=mean_minus_std", "--over_long=-7"])
    args.over_long = -7.0
    args.max_length = 60
    service = serve._service(args)
    service.ready = True
    assert "rewards are the mean_minus_std of 3 models" in capsys.readouterr().out
    talks = _talks({**ROW, "responses": WORDS[:2]})
    own = np.stack([RewardModel.load(place).score(talks) for place in three], 1)
    text = service.model.chat.render(talks[0])
    requests = {
        "/score": {"text_1": ROW["prompt"], "text_2": [*WORDS[:2], "far too long " * 60]},
        "/classify": {"messages": talks[0]},
        "/pooling": {"messages": talks[0]},
        "/rerank": {"query": ROW["prompt"], "documents": WORDS[:2]},
        "/v1/embeddings": {"input": text},
        "/get_reward": {"query": [text]},
        "/": {"prompt": ROW["prompt"], "response": WORDS[0]},
    }
    answers = {**asyncio.run(_ask(service, requests))}
    sglang = asyncio.run(_ask(service, {"/classify": {"text": text}}))["/classify"]
    service.batcher.close(10)
    combined, spread = own.mean(1) - own.std(1), own.std(1)
    close = lambda value: pytest.approx(value, abs=1e-5)
    scored = answers["/score"]["data"]
    assert [(x["score"], x["spread"]) for x in scored[:2]] == [(close(a), close(b)) for a, b in zip(combined, spread)]
    assert (scored[2]["score"], scored[2]["spread"]) == (-7.0, None)
    (classified,), (pooled,) = answers["/classify"]["data"], answers["/pooling"]["data"]
    assert classified["probs"] == [close(combined[0])] and classified["num_classes"] == 1
    assert pooled["data"] == [close(combined[0])] and pooled["spread"] == classified["spread"] == close(spread[0])
    ranked = answers["/rerank"]["results"]
    assert ranked[0]["index"] == combined.argmax() and ranked[0]["spread"] == close(spread[combined.argmax()])
    assert answers["/v1/embeddings"]["data"][0]["embedding"] == [close(combined[0])]
    assert answers["/get_reward"]["rewards"] == [close(combined[0])]
    assert answers["/get_reward"]["spread"] == [close(spread[0])]
    assert answers["/"] == close(combined[0]) and sglang["meta_info"]["spread"] == close(spread[0])


async def _ask(service, requests):
    transport = httpx.ASGITransport(app.build(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        return {path: (await client.post(path, json=body)).json() for path, body in requests.items()}

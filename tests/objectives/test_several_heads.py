"""Several heads on one model (config.model.heads): their loss by hand, what each counts, and what is made of them."""

import asyncio
import dataclasses
import json

import httpx
import jax
import numpy as np
import pytest
import small_runs
from test_objectives import make_batch, pairs

from rmjax import objectives
from rmjax.batches import loader, prepare, resampling
from rmjax.batches.resampling import Resampled, weights
from rmjax.config import check, defaults
from rmjax.evaluate import measures, outcomes
from rmjax.evaluate.scored import Scored
from rmjax.export import verify
from rmjax.export import write as export
from rmjax.inference import contract, runs
from rmjax.inference.reward_model import RewardModel, load_checked
from rmjax.models import hf
from rmjax.objectives.bradley_terry import BradleyTerry
from rmjax.score import __main__ as score
from rmjax.serve import __main__ as serve
from rmjax.serve import app

HEADS = 3
WORDS = ["the river is deep", "no", "a garden, and a lake, and a river"]
PROMPT = "Tell me about the river."


def talk(text):
    return [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": text}]


# The loss


def made(seed=0):
    """Scores [B, E, M], batch with bootstrap weights, and the margins [B, G, M] of the chosen responses."""
    each = [pairs(seed=seed + m)[0] for m in range(HEADS)]
    wins = pairs()[1]
    weight = np.random.default_rng(seed).uniform(0.5, 2, wins.shape[:2]).astype(np.float32)
    flat = np.concatenate([make_batch(x, wins)[0] for x in each], -1)
    _, batch = make_batch(each[0], wins, weight)
    counted = np.random.default_rng(seed + 9).poisson(1, (*weight.shape, HEADS)).astype(np.float32)
    return flat, {**batch, resampling.FIELD: counted}, np.stack([x[..., 0] - x[..., 1] for x in each], -1)


def test_loss_and_gradients_are_those_of_each_head_on_its_own_sample():
    import torch
    import torch.nn.functional as F

    flat, batch, margins = made()
    objective = BradleyTerry(heads=HEADS)
    loss = lambda s: objective.loss_sums(s, batch, {})
    (numerator, denominator), pull = jax.vjp(jax.jit(loss), flat)
    (gradient,) = pull((np.float32(1), np.float32(0)))
    d = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor(batch["weight"][..., None] * batch[resampling.FIELD], dtype=torch.float64)
    by_head = [(-F.logsigmoid(d[..., m]) * counts[..., m]).sum() for m in range(HEADS)]
    (sum(by_head) / HEADS).backward()
    assert float(numerator) == pytest.approx(sum(by_head).item() / HEADS, rel=1e-5)
    assert float(denominator) == pytest.approx(float(counts.sum()) / HEADS, rel=1e-6)
    at_chosen = np.zeros_like(margins)
    for b, g in np.ndindex(margins.shape[:2]):
        e = np.flatnonzero((batch["end_group"][b] == g) & (batch["end_slot"][b] == 0))[0]
        at_chosen[b, g] = gradient[b, e]
    np.testing.assert_allclose(at_chosen, d.grad.numpy(), rtol=1e-5, atol=1e-7)
    assert (np.abs(gradient) > 0).sum() == 2 * (batch[resampling.FIELD] > 0).sum()


def test_evaluation_counts_every_group_for_every_head_and_the_score_is_the_mean():
    flat, batch, margins = made()
    objective, one = BradleyTerry(heads=HEADS), BradleyTerry()
    plain = {name: x for name, x in batch.items() if name != resampling.FIELD}
    sums = np.array([one.loss_sums(flat[..., m : m + 1], plain, {}) for m in range(HEADS)])
    np.testing.assert_allclose(objective.loss_sums(flat, plain, {}), sums.mean(0), rtol=1e-6)
    found, mean = objective.outcomes(flat, plain, {}), one.outcomes(flat.mean(-1, keepdims=True), plain, {})
    np.testing.assert_allclose(found["scores"], mean["scores"], atol=1e-6)
    np.testing.assert_allclose(found["members"][..., 0, :] - found["members"][..., 1, :], margins, atol=1e-6)
    assert found.keys() - mean.keys() == {"members"}
    decoded = objective.decode(flat[0], {})
    np.testing.assert_allclose(decoded["score"], flat[0].mean(1), rtol=1e-6)
    np.testing.assert_allclose(decoded["spread"], flat[0].std(1), rtol=1e-5)
    with pytest.raises(ValueError, match=r"scores \(3, 8, 2\) and bootstrap .* expected 3 last"):
        objective.loss_sums(flat[..., :2], batch, {})


def test_one_head_is_as_it_was():
    config, one = defaults(), BradleyTerry()
    assert objectives.of_config(config) == objectives.make(config.objective) == one
    assert one.labels == ("LABEL_0",) and "heads" not in one.terms() and one.decoding == "the output is the reward"
    flat, batch, _ = made()
    plain = {name: x for name, x in batch.items() if name != resampling.FIELD}
    assert set(one.outcomes(flat[..., :1], plain, {})) == {"scores", "present", "wins", "ties", "weight"}
    assert one.decode(flat[0, :, :1], {}).keys() == {"score"}
    config.model.heads = HEADS
    several = objectives.of_config(config)
    assert several == BradleyTerry(heads=HEADS) and several.labels == ("head_0", "head_1", "head_2")
    assert objectives.make({"name": "bradley_terry", **several.terms()}) == several


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        ("bradley_terry", {"model.heads": 0}, "config.model.heads=0 must be at least 1"),
        ("pointwise", {"model.heads": 2}, "config.model.heads=2 is for `bradley_terry`.*`pointwise`"),
        ("bradley_terry", {"model.heads": 2, "objective.ties": "davidson"}, "ties='davidson' .* config.model.heads=2"),
    ],
)
def test_values_that_mean_nothing(kind, values, says):
    config = defaults(kind)
    config.data.train, config.model.init_from = "x.jsonl", "somewhere"
    config.update_from_flattened_dict(values)
    with pytest.raises(ValueError, match=says):
        check(config)
        objectives.of_config(config)


# What each head counts


def test_weights_are_poisson_and_the_heads_apart():
    keys = np.random.default_rng(0).integers(0, 2**64, 20_000, np.uint64)
    found = weights(keys, 4, 0)
    for k, share in enumerate((0.3679, 0.3679, 0.1839, 0.0613)):  # e^-1 / k!
        np.testing.assert_allclose((found == k).mean(0), share, atol=0.012)
    others = np.concatenate([found, weights(keys, 4, 1), weights(keys + np.uint64(1), 4, 0)], 1)
    assert np.abs(np.corrcoef(others.T) - np.eye(12)).max() < 0.03
    np.testing.assert_array_equal(weights(keys, 2, 0), found[:, :2])
    np.testing.assert_array_equal(weights(keys[::-1], 4, 0), found[::-1])
    assert weights(np.array([1, 2], np.uint64), 3, 7).tolist() == FIXED  # a resumed run finds the same


FIXED = [[3.0, 1.0, 0.0], [0.0, 1.0, 0.0]]


def test_a_group_has_its_weights_wherever_it_stands(cache_dir, tmp_path):
    config = small_runs.small(cache_dir, **{"data.augment": "swap"})
    chat = prepare.open_chat(config, tmp_path)
    plain, _ = prepare.read_groups(config, chat, objectives.of_config(config).task)
    groups = Resampled(plain, HEADS, config.seed)
    want = dict(zip(map(groups.id, range(len(groups))), weights(plain.response_sets, HEADS, config.seed).tolist()))
    for row_tokens, micro_rows in ((256, 4), (512, 1)):
        config.plan.row_tokens = row_tokens
        plan = prepare.plan_training(config, groups)
        shape = prepare.batch_shape(groups, plan, 1, micro_rows)
        source = loader.StepSource(groups, plan, shape, range(shape.rows))
        for step in (0, plan.steps - 1):
            counted = source[step][resampling.FIELD].reshape(-1, shape.groups, HEADS)
            for row, names in zip(counted, plan.rows(step)):
                assert row[: len(names)].tolist() == [want[groups.id(int(i))] for i in names]
    sets = plain.response_sets.tolist()
    assert len(set(sets)) < len(sets)  # a copy with the responses reversed is the same group, with the same weights
    assert resampling.FIELD not in plain.fields and not isinstance(groups.sample(5, 0), Resampled)


# What is made of them


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(cache_dir, tmp_path_factory):
    """The workdir of a small run with several heads."""
    workdir = tmp_path_factory.mktemp("heads")
    small_runs.Started(workdir, cache_dir, **{"model.heads": HEADS, "eval.every": "10 steps"}).finish()
    return workdir


@pytest.fixture(scope="module")
def by_transformers(trained):
    """Token ids of three renderings, and transformers' logits [3, M]."""
    import torch
    import transformers

    place = trained / "export"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place, dtype=torch.float32)
    chat = RewardModel.load(place).chat
    ids = chat.encode([chat.render(talk(text)) for text in WORDS])
    with torch.no_grad():
        return ids, np.concatenate([model(input_ids=torch.tensor([x])).logits.numpy() for x in ids])


def test_an_export_gives_every_head_and_its_contract_says_what_they_mean(trained, by_transformers):
    place, (ids, logits) = trained / "export", by_transformers
    assert json.loads((place / "config.json").read_text())["id2label"] == {str(m): f"head_{m}" for m in range(HEADS)}
    terms = contract.read(place)
    assert terms["labels"] == ["head_0", "head_1", "head_2"] and terms["objective"]["heads"] == HEADS
    assert "the reward is the mean of the 3 outputs" in terms["decoding"] and "spread" in terms["decoding"]
    assert all(np.shape(row["outputs"]) == (1, HEADS) for row in terms["golden"])
    assert len(verify.verify(place)) > 2
    assert "The outputs are the heads', whose mean is the reward" in (place / "README.md").read_text()
    model = load_checked(place)
    values = model.values([talk(text) for text in WORDS])
    np.testing.assert_allclose(values["score"], logits.mean(1), atol=1e-5)
    np.testing.assert_allclose(values["spread"], logits.std(1), atol=1e-5)
    assert values["spread"].min() > 1e-3
    np.testing.assert_allclose(model.score_tokens(ids), logits.mean(1), atol=1e-5)
    of_run = runs.open_checkpoint(runs.Place(trained))
    assert of_run.model.objective.heads == HEADS


def test_rewards_of_unit_deviation_keep_what_they_mean(trained):
    terms = contract.read(trained / "export")
    kernel = np.random.default_rng(0).normal(size=(4, HEADS))
    params, changed = export.scaled({"score": {"kernel": kernel}}, terms)
    np.testing.assert_allclose(params["score"]["kernel"], kernel / terms["reward_std"])
    assert changed["reward_mean"] == pytest.approx(terms["reward_mean"] / terms["reward_std"])
    assert changed["decoding"].startswith(terms["decoding"]) and "their rewards times that" in changed["decoding"]
    name = "validation/reward_spread"
    assert changed["metrics"][name] == pytest.approx(terms["metrics"][name] / terms["reward_std"])


def test_a_run_measures_the_mean_and_its_members(trained):
    told = ["reward_spread", "members_accuracy", "members_ece"]
    told += [f"error_auc_{name}" for name in ("margin", "spread", "margin_spread")]
    last = small_runs.metrics(trained)[-1]
    assert all(f"validation/{name}" in last for name in told), last
    assert any("train/members_accuracy" in line for line in small_runs.metrics(trained))
    measured = json.loads((trained / "evaluation.json").read_text())["sets"]["validation"]["metrics"]
    for name in ("accuracy", *told):
        assert measured[name]["value"] == pytest.approx(last[f"validation/{name}"], abs=1e-5), name


def test_measures_of_members_by_hand():
    rng, groups = np.random.default_rng(0), []
    wins = np.array([[0.0, 1.0], [0.0, 0.0]])
    for n in range(200):
        members = rng.normal(size=(2, HEADS)) + [[0.7], [0.0]]
        zeros, tokens = np.zeros((2, 2)), np.ones(2, np.int64)
        groups.append(Scored(str(n), n, "x", wins, zeros, zeros, tokens, members.mean(1), members=members))
    rewards = np.stack([g.members for g in groups])
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = {name: x["value"] for name, x in measures.preferences(groups)["metrics"].items()}
    assert metrics["accuracy"] == pytest.approx((margins.mean(1) > 0).mean())
    assert metrics["members_accuracy"] == pytest.approx((margins > 0).mean()) and metrics["accuracy"] > 0.7
    assert metrics["reward_spread"] == pytest.approx(rewards.std(2).mean())
    sure = 1 / (1 + np.exp(-np.abs(margins.ravel())))
    bins = np.clip(((sure - 0.5) / 0.05).astype(int), 0, 9)
    gaps = [abs((sure - (margins.ravel() > 0))[bins == b].sum()) for b in range(10)]
    assert metrics["members_ece"] == pytest.approx(sum(gaps) / len(sure))
    outcome = {"scores": rewards.mean(2), "members": rewards, "present": np.ones((200, 2)), "weight": np.ones(200)}
    outcome |= {"wins": np.tile(wins, (200, 1, 1)), "ties": np.zeros((200, 2, 2))}
    task = BradleyTerry(heads=HEADS).task
    looped = outcomes.evaluation_metrics(task, {k: x[:, None] for k, x in outcome.items()}, np.ones(2))
    for name in ("accuracy", "members_accuracy", "members_ece", "reward_spread", "error_auc_spread"):
        assert looped[name] == pytest.approx(metrics[name]), name
    diverged = {**outcome, "scores": np.full((200, 2), np.nan), "members": np.full(rewards.shape, np.nan)}
    outcomes.step_sums(task, {k: x[:, None] for k, x in diverged.items()})


def test_score_and_serve_give_the_mean_and_the_spread(trained, by_transformers, tmp_path):
    place, (ids, logits) = trained / "export", by_transformers
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": PROMPT, "responses": WORDS}) + "\n")
    terms = contract.read(place)
    mean, std = terms["reward_mean"], terms["reward_std"]
    score.run(str(place), str(source), out, normalize=True)
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    np.testing.assert_allclose(row["scores"], (logits.mean(1) - mean) / std, atol=1e-4)
    np.testing.assert_allclose(row["spread"], logits.std(1) / std, atol=1e-4)
    args = serve.parser().parse_args([f"--model={place}", "--normalize"])
    args.over_long, args.max_length = -7.0, len(max(ids, key=len))
    service = serve._service(args)
    service.ready = True

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app.build(service)), base_url="http://t") as client:
            long = [*WORDS, "far too long " * 60]
            scored = await client.post("/score", json={"text_1": PROMPT, "text_2": long}, timeout=120)
            return scored.json(), (await client.post("/classify", json={"messages": talk(WORDS[0])})).json()

    scored, classified = asyncio.run(ask())
    service.batcher.close(10)
    np.testing.assert_allclose([x["score"] for x in scored["data"][:3]], row["scores"], atol=1e-4)
    np.testing.assert_allclose([x["spread"] for x in scored["data"][:3]], row["spread"], atol=1e-4)
    assert (scored["data"][3]["score"], scored["data"][3]["spread"]) == (-7.0, None)
    (of_one,) = classified["data"]
    assert of_one["probs"] == [pytest.approx(row["scores"][0], abs=1e-4)] and of_one["label"] == "score"


def test_members_are_those_of_several_heads_only(trained):
    model = RewardModel.load(trained / "export")
    assert model.has_spread and hf.read_config(trained / "export")["id2label"]["2"] == "head_2"
    model.objective = dataclasses.replace(model.objective, heads=1)
    assert not model.has_spread

"""Pointwise losses against torch and hand-worked cases, metrics against sklearn and scipy, and what is missing."""

import dataclasses
import functools
import json
import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up_answers import metrics_of, sums_of
from ml_collections import ConfigDict

from rmjax import objectives, statistics
from rmjax.batches.tasks import Attributes
from rmjax.config import defaults
from rmjax.data.records import BadRow, Record
from rmjax.evaluate import moments, ratings
from rmjax.evaluate.estimates import Estimates
from rmjax.objectives import sums as sums_lib
from rmjax.objectives.gather import at_ends
from rmjax.objectives.pointwise import LOSSES, Pointwise
from rmjax.train import training

ROOT = Path(__file__).parents[2]
TWO = ("helpfulness", "verbosity")
SCALES = ((0.0, 4.0), (1.0, 6.0))


def make(loss="mse", **keys):
    return Pointwise(**{"attributes": TWO, "scales": SCALES, "loss": loss} | keys)


def make_batch(objective, b=4, g=6, k=2, seed=0, whole=True):
    """Outputs [B, E, O] in a shuffled order with absent ends, and their batch; a third of the labels is missing."""
    rng = np.random.default_rng(seed)
    a = len(objective.attributes)
    low, high = np.array(objective.limits).T
    value = rng.uniform(low, high, (b, g, k, a)) if not whole else rng.integers(low, high + 1, (b, g, k, a))
    mask = rng.random((b, g, k, a)) < 0.67
    order = np.stack([rng.permutation(np.append(np.arange(g * k), [-1, -1])) for _ in range(b)])
    here = order >= 0
    outputs = rng.normal(size=(*order.shape, len(objective.labels))) * here[..., None]
    batch = {
        "end": np.where(here, np.arange(order.shape[1]), -1),
        "end_group": np.where(here, order // k, -1),
        "end_slot": np.where(here, order % k, -1),
        "value": np.where(mask, value, 0).astype(np.float32),
        "mask": mask.astype(np.float32),
        "weight": rng.uniform(0.5, 2, (b, g)).astype(np.float32),
    }
    return outputs.astype(np.float32), batch


def flat(outputs, batch):
    """Every response that is there, by plain loops: outputs [n, O], labels [n, A] (NaN: missing), weights [n]."""
    rows = []
    for b, e in zip(*np.nonzero(batch["end"] >= 0)):
        g, k = batch["end_group"][b, e], batch["end_slot"][b, e]
        label = np.where(batch["mask"][b, g, k] > 0, batch["value"][b, g, k], np.nan)
        rows.append((outputs[b, e], label, batch["weight"][b, g]))
    return tuple(np.stack(x) for x in zip(*rows))


def values_of(objective, outputs, batch, params=None):
    return metrics_of(objective, outputs, batch, objective.params() if params is None else params)


def torch_mean(losses, label, weight):
    """Weighted mean over the labels that are there, of torch losses [n, A]."""
    import torch

    here = ~np.isnan(label)
    weights = torch.tensor(np.where(here, weight[:, None], 0))
    return ((losses.nan_to_num() * weights).sum() / weights.sum()).item()


# Losses


def normalised(label):
    import torch

    low, high = np.array(SCALES).T
    return torch.tensor((label - (low + high) / 2) / ((high - low) / 2), dtype=torch.float32)


@pytest.mark.parametrize("delta", [0.3, 2.0])
def test_mse_and_huber_are_torchs_on_the_normalised_scale(delta):  # NUMERICS 8 and 11: B, G, K, A are all above 1
    import torch
    import torch.nn.functional as F

    outputs, batch = make_batch(make(), whole=False)
    f, label, weight = flat(outputs, batch)
    target = normalised(label)
    expected = torch_mean(F.mse_loss(torch.tensor(f), target, reduction="none"), label, weight)
    assert values_of(make(), outputs, batch)["loss"] == pytest.approx(expected, rel=1e-6)
    expected = torch_mean(F.huber_loss(torch.tensor(f), target, reduction="none", delta=delta), label, weight)
    assert values_of(make("huber", delta=delta), outputs, batch)["loss"] == pytest.approx(expected, rel=1e-6)


def test_categorical_is_torchs_cross_entropy_of_each_attribute():
    import torch
    import torch.nn.functional as F

    objective = make("categorical")
    outputs, batch = make_batch(objective)
    f, label, weight = flat(outputs, batch)
    here = ~np.isnan(label)
    first = F.cross_entropy(
        torch.tensor(f[here[:, 0], :5]), torch.tensor(label[here[:, 0], 0]).long(), reduction="none"
    )
    second = F.cross_entropy(
        torch.tensor(f[here[:, 1], 5:]), torch.tensor(label[here[:, 1], 1] - 1).long(), reduction="none"
    )
    weights = torch.tensor(np.concatenate([weight[here[:, 0]], weight[here[:, 1]]]))
    expected = ((torch.cat([first, second]) * weights).sum() / weights.sum()).item()
    assert values_of(objective, outputs, batch)["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_label_between_two_bins_is_divided_between_them():
    import torch
    import torch.nn.functional as F

    objective = Pointwise(loss="categorical")
    target = np.array(objective.targets(jnp.array([2.25, 4.0, 0.0]), 0))
    np.testing.assert_allclose(target, [[0, 0, 0.75, 0.25, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]], atol=1e-7)
    logits = np.random.default_rng(0).normal(size=(1, 5)).astype(np.float32)
    loss = objective.losses(jnp.asarray(logits), jnp.array([[2.25]]), {})
    soft = torch.tensor([[0, 0, 0.75, 0.25, 0]])
    assert loss.item() == pytest.approx(F.cross_entropy(torch.tensor(logits), soft).item(), rel=1e-6)


def test_ordinal_by_hand():
    # Four levels cut at -1, 0.5, 2 and f = 0.3: P(y <= k) = 1 / (1 + exp(f - c_k)), McCullagh 1980, eq. 2.1.
    objective = Pointwise(scales=(1, 4), loss="ordinal")
    raw = [-1.0, math.log(math.expm1(1.5)), math.log(math.expm1(1.5))]
    params = {"cuts": np.array([raw], np.float32)}
    np.testing.assert_allclose(objective.cut_points(0, params), [-1, 0.5, 2], rtol=1e-6)
    up_to = [1 / (1 + math.exp(0.3 - c)) for c in (-1, 0.5, 2)]
    expected = np.array([up_to[0], up_to[1] - up_to[0], up_to[2] - up_to[1], 1 - up_to[2]])
    assert expected.round(4).tolist() == [0.2142, 0.3357, 0.2957, 0.1545]
    outputs = jnp.full((4, 1), 0.3)
    loss = objective.losses(outputs, jnp.array([[1.0], [2.0], [3.0], [4.0]]), params)
    np.testing.assert_allclose(loss[:, 0], -np.log(expected), rtol=1e-5)
    between = objective.losses(outputs[:1], jnp.array([[2.5]]), params)
    assert between.item() == pytest.approx(-np.log(expected[1:3]).mean(), rel=1e-5)
    assert objective.decode(np.array(outputs), params)["score"][0] == pytest.approx(expected @ [1, 2, 3, 4], rel=1e-6)


def test_ordinal_starts_with_levels_that_are_equally_likely_whatever_their_number():
    objective = make("ordinal", scales=((0, 4), (0, 1)))
    params = objective.params()
    assert params["cuts"].shape == (2, 4) and params["cuts"].dtype == np.float32
    for a, n in enumerate((5, 2)):
        share = np.exp(objective.log_probabilities(np.zeros((1, 1), np.float32), a, params))
        np.testing.assert_allclose(share, np.full((1, n), 1 / n), rtol=1e-5)
    scores = objective.scores(np.zeros((1, 2), np.float32), params)
    np.testing.assert_allclose(scores, [[2, 0.5]], rtol=1e-5)


@pytest.mark.parametrize("f", [-1e4, -80.0, 80.0, 1e4])
def test_ordinal_is_finite_for_any_output(f):  # NUMERICS 10
    objective = Pointwise(loss="ordinal")
    params = objective.params()
    loss = lambda f: objective.losses(f, jnp.array([[0.0], [2.0], [4.0]]), params).sum()
    value, gradient = jax.value_and_grad(loss)(jnp.full((3, 1), f))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    with np.errstate(all="raise", under="ignore"):
        score = objective.decode(np.full((1, 1), f, np.float32), params)["score"]
    assert score[0] == pytest.approx(4.0 if f > 0 else 0.0)


def test_hl_gauss_targets_are_the_papers():
    import scipy.special
    import scipy.stats

    # Farebrother et al. 2024, appendix A: differences of the normal's cdf at the edges of the bins, over their sum.
    objective = Pointwise(scales=(0, 4), loss="hl_gauss", sigma=0.75)
    centres = objective.levels(0)
    assert centres.tolist() == [-3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7]  # 2.25 = 3 sigma beyond the scale
    for y in (0.0, 1.3, 4.0):
        support = np.linspace(-3.5, 7.5, 12)
        cdf = scipy.special.erf((support - y) / (np.sqrt(2) * 0.75))
        expected = np.diff(cdf) / (cdf[-1] - cdf[0])
        target = np.array(objective.targets(jnp.array([y]), 0))[0]
        np.testing.assert_allclose(target, expected, atol=1e-6)
        np.testing.assert_allclose(target, np.diff(scipy.stats.norm.cdf(support, y, 0.75)), atol=1e-5)
        assert target @ centres == pytest.approx(y, abs=0.02)  # a bin of the ends is not drawn inwards
        logits = np.log(np.maximum(target, 1e-30))[None].astype(np.float32)
        assert objective.decode(logits, {})["score"][0] == pytest.approx(y, abs=0.02)


def test_hl_gauss_is_torchs_cross_entropy_with_these_targets():
    import torch
    import torch.nn.functional as F

    objective = Pointwise(scales=(1, 10), loss="hl_gauss", bins=19, sigma=2.0)
    assert len(objective.labels) == 19 + 12 and objective.labels[0] == "score=-2" and objective.labels[7] == "score=1.5"
    rng = np.random.default_rng(1)
    logits, label = rng.normal(size=(6, 31)).astype(np.float32), rng.uniform(1, 10, (6, 1)).astype(np.float32)
    target = np.array(objective.targets(jnp.asarray(label[:, 0]), 0))
    expected = F.cross_entropy(torch.tensor(logits), torch.tensor(target), reduction="none")
    np.testing.assert_allclose(objective.losses(jnp.asarray(logits), label, {})[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_finite_differences(loss):
    objective = make(loss, sigma=1.1)
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        f = jnp.asarray(rng.normal(size=(4, len(objective.labels))))
        own = {name: jnp.asarray(x, jnp.float64) + 0.1 for name, x in objective.params().items()}
        label = jnp.asarray([[0.0, 1.0], [1.7, 6.0], [4.0, 3.3], [2.0, 2.0]])
        total = jax.jit(lambda f, own: objective.losses(f, label, own).sum())
        gradient = jax.jit(jax.grad(total, argnums=(0, 1)))(f, own)
        direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), (f, own))
        moved = lambda step: total(*jax.tree.map(lambda x, d: x + step * d, (f, own), direction))
        numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
        exact = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
        assert float(exact) == pytest.approx(float(numeric), rel=1e-7)


# What is missing, absent or split


@pytest.mark.parametrize("loss", LOSSES)
def test_a_missing_label_changes_nothing(loss):
    objective = make(loss, scales=((0, 4), (90, 100)))  # at 0, which stands where a label is missing, HL-Gauss is 0 / 0
    outputs, batch = make_batch(objective)
    params = objective.params()
    other = dict(batch, value=np.where(batch["mask"] > 0, batch["value"], np.nan))

    gradient_of = jax.jit(jax.grad(lambda f, batch: objective.loss_sums(f, batch, params)[0]))
    gradient, gradient_too = (gradient_of(outputs, x) for x in (batch, other))
    values, values_too = (values_of(objective, outputs, x) for x in (batch, other))
    np.testing.assert_array_equal(gradient, gradient_too)
    assert values == values_too and all(map(math.isfinite, values.values()))
    size = len(objective.labels) // 2 if loss in ("mse", "huber", "ordinal") else len(objective.levels(0))
    parts = np.split(np.array(gradient), [size], axis=-1)
    for a, part in enumerate(parts):  # outputs of one attribute do not learn from the other's label
        here = np.array(at_ends(batch["mask"], batch["end_group"], batch["end_slot"]))[..., a] > 0
        assert ((part != 0).any(-1) == here).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_an_attribute_without_labels_is_left_out_and_leaves_the_other_alone(loss):
    objective, alone = make(loss), Pointwise(TWO[:1], SCALES[0], loss)
    outputs, batch = make_batch(objective)
    batch["mask"][..., 1] = 0
    first = dict(batch, value=batch["value"][..., :1], mask=batch["mask"][..., :1])
    params = objective.params()
    of_first = {name: x[:1, : len(objective.levels(0)) - 1] for name, x in params.items()}
    both = values_of(objective, outputs, batch, params)
    one = values_of(alone, outputs[..., : len(alone.labels)], first, of_first)
    assert "mse/verbosity" not in both and "pearson/verbosity" not in both and both["labels"] == one["labels"]
    shared = [name for name in one if not name.startswith("reward")]
    assert len(shared) == 15 and {n: both[n] for n in shared} == pytest.approx({n: one[n] for n in shared}, rel=1e-6)


def test_nothing_measured():
    outputs, batch = make_batch(make())
    values = values_of(make(), outputs, dict(batch, mask=np.zeros_like(batch["mask"])))
    assert set(values) == {"labels", "reward_mean", "reward_std", "reward_max", "reward_min"} and values["labels"] == 0


def test_labels_come_to_their_ends():
    group, slot = np.array([[1, -1, 0], [0, 0, -1]]), np.array([[0, -1, 1], [1, 0, -1]])
    labels = np.arange(8.0).reshape(2, 2, 2)
    assert at_ends(labels, group, slot).tolist() == [[2, 0, 1], [5, 4, 0]]
    assert at_ends(labels, group).tolist() == [[[2, 3], [0, 0], [0, 1]], [[4, 5], [4, 5], [0, 0]]]
    with pytest.raises(ValueError, match=r"not \[B, G, \.\.\.\]"):
        at_ends(labels, group, slot[:, :2])


def test_shapes_that_would_broadcast_are_refused():  # NUMERICS 8
    outputs, batch = make_batch(make())
    for name in ("value", "mask"):
        with pytest.raises(ValueError, match=r"not \[B,G,K,A\]"):
            make().loss_sums(outputs, batch | {name: batch[name][..., :1]}, {})
    with pytest.raises(ValueError, match=r"expected 2 last, helpfulness, verbosity"):
        make().loss_sums(outputs[..., :1], batch, {})


@pytest.mark.parametrize("loss", LOSSES)
def test_sums_add_over_any_split(loss):  # NUMERICS 9 and 18
    objective = make(loss)
    outputs, batch = make_batch(objective, b=4)
    params = objective.params()
    of = lambda rows: sums_of(objective, outputs[rows], {name: x[rows] for name, x in batch.items()}, params)
    total = functools.reduce(sums_lib.add, [of(slice(i, i + 1)) for i in range(4)])
    assert sums_lib.ratios(total) == pytest.approx(sums_lib.ratios(of(slice(0, 4))), rel=1e-5)


# Metrics


@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_are_sklearns_and_scipys(loss):
    import scipy.stats
    import sklearn.metrics

    objective = make(loss)
    outputs, batch = make_batch(objective, b=4)
    batch["weight"][:] = 1
    values = values_of(objective, outputs, batch)
    f, label, _ = flat(outputs, batch)
    decoded = objective.decode(f, objective.params())
    found = {}
    for a, name in enumerate(TWO):
        here = ~np.isnan(label[:, a])
        score, truth = decoded[name][here].astype(np.float64), label[here, a]
        rating = np.clip(np.floor(score + 0.5), *SCALES[a]).astype(int)
        levels = np.arange(SCALES[a][0], SCALES[a][1] + 1).astype(int)
        found |= {
            f"mse/{name}": sklearn.metrics.mean_squared_error(truth, score),
            f"mae/{name}": sklearn.metrics.mean_absolute_error(truth, score),
            f"pearson/{name}": scipy.stats.pearsonr(truth, score).statistic,
            f"spearman/{name}": scipy.stats.spearmanr(truth, score).statistic,
            f"kappa/{name}": sklearn.metrics.cohen_kappa_score(
                truth.astype(int), rating, weights="quadratic", labels=levels
            ),
            f"within_1/{name}": np.mean(np.abs(rating - truth) <= 1),
        }
    assert {name: values[name] for name in found} == pytest.approx(found, rel=1e-4, abs=1e-6)
    for metric in ("pearson", "spearman", "kappa"):
        assert values[metric] == pytest.approx(np.mean([found[f"{metric}/{name}"] for name in TWO]), rel=1e-4)
    counts = (~np.isnan(label)).sum(0)
    assert values["mse"] == pytest.approx(np.average([found[f"mse/{name}"] for name in TWO], weights=counts), rel=1e-5)
    assert values["labels"] == counts.sum()
    assert values["reward_mean"] == pytest.approx(decoded["score"].mean(), rel=1e-5)
    assert values["reward_std"] == pytest.approx(decoded["score"].std(), rel=1e-3)


def test_kappa_counts_as_sklearn_does_and_correlations_know_where_they_are_undefined():
    import sklearn.metrics

    def estimate(of, x, y):
        found = Estimates(np.zeros(len(x), int))
        found.add("x", of, moments.second(found, np.arange(len(x)), np.asarray(x, float), np.asarray(y, float)))
        return found.others().get("x")

    rng = np.random.default_rng(3)
    for _ in range(20):
        x, y = rng.integers(0, rng.integers(2, 9), (2, 50)) + rng.integers(-2, 3, (2, 1))
        expected = sklearn.metrics.cohen_kappa_score(x, y, weights="quadratic", labels=np.arange(-3, 12))
        assert estimate(moments.kappa, x, y) == pytest.approx(expected, abs=1e-12)
    assert estimate(moments.kappa, [0, 0], [0, 4]) == 0
    constant, other = np.full(5, 2.0), np.arange(5.0)
    for of in (moments.correlation, moments.kappa):
        assert estimate(of, constant, constant) is None and estimate(of, other[:1], other[:1]) is None
    for measure in (statistics.pearson, statistics.spearman):
        assert math.isnan(measure(constant, constant)) and math.isnan(measure(other[:1], other[:1]))
        assert math.isnan(measure(constant, other)) and math.isnan(measure(other, constant))


def test_ratings_are_whole_numbers_of_the_scale():
    scores = np.array([[-9.0, -9.0], [0.5, 0.49], [2.5, 1.5], [9.0, 9.0]])
    assert ratings.rating(scores, (0, -1.5), (4, 2.5)).tolist() == [[0, -1], [1, 0], [3, 2], [4, 2]]


# What outputs mean


def test_decoding_reports_scores_on_their_scales_and_the_weighted_sum():
    decoded = make(weights=(0.65, -0.4)).decode(np.array([[-1.0, 0.0], [0.5, 1.0]], np.float32), {})
    assert decoded["helpfulness"].tolist() == [0, 3] and decoded["verbosity"].tolist() == [3.5, 6]
    np.testing.assert_allclose(decoded["score"], [-1.4, -0.45], rtol=1e-6)
    mean = make().decode(np.array([[-1.0, 0.0]], np.float32), {})["score"]
    assert mean.tolist() == [1.75] and mean.dtype == np.float32


@pytest.mark.parametrize("loss", LOSSES)
def test_the_host_decodes_what_the_device_measures(loss):
    objective = make(loss)
    outputs, _ = make_batch(objective)
    params = objective.params()
    on_device = jax.jit(lambda f: objective.scores(f, params, jnp))(outputs)
    on_host = objective.scores(outputs, params)
    assert on_host.dtype == np.float32
    np.testing.assert_allclose(on_device, on_host, rtol=1e-5, atol=1e-5)


def test_labels_name_the_outputs():
    assert make().labels == make("ordinal").labels == TWO
    assert make("categorical", scales=(0, 1)).labels == (
        *("helpfulness=0", "helpfulness=1"),
        *("verbosity=0", "verbosity=1"),
    )
    assert Pointwise(loss="categorical", scales=(0, 1), bins=3).labels == ("score=0", "score=0.5", "score=1")


# Config and data


def test_made_from_the_config_and_again_from_its_terms():
    config = defaults("pointwise")
    assert objectives.make(config.objective) == Pointwise()
    config.objective.update({"attributes": TWO, "scales": SCALES, "loss": "ordinal", "weights": (2.0, 1.0)})
    objective = objectives.make(config.objective)
    assert objective == make("ordinal", weights=(2.0, 1.0))
    terms = json.loads(json.dumps({"name": "pointwise", **objective.terms()}))
    assert objectives.make(terms) == objective
    assert {field.name for field in dataclasses.fields(Pointwise)} | {"name"} == set(config.objective)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"attributes": ()}, r"attributes=\(\) must be one or several different names"),
        ({"attributes": ("a", "a")}, "must be one or several different names"),
        ({"attributes": ("score", "a")}, "'score' is what the weighted sum is called"),
        ({"scales": (4, 0)}, r"scales=\(4, 0\) must be \(low, high\)"),
        ({"scales": (0, 1, 2)}, r"must be \(low, high\)"),
        ({"scales": ((0, 1), (0, 1))}, r"must be \(low, high\)"),
        ({"scales": (0, math.inf)}, r"must be \(low, high\)"),
        ({"scales": ("0", "b")}, r"must be \(low, high\)"),
        ({"loss": "l2"}, "loss='l2' is none of mse, huber, ordinal"),
        ({"delta": 0}, "delta=0 must be above 0"),
        ({"sigma": -1.0}, "sigma=-1.0 must be above 0"),
        ({"bins": 1}, "bins=1 must be 2 or more"),
        ({"scales": (0, 0.5), "loss": "ordinal"}, "are not whole numbers; say how many config.objective.bins"),
        ({"weights": (1.0, 2.0)}, r"weights=\(1.0, 2.0\) must be one number for each"),
    ],
)
def test_wrong_keys_are_refused(keys, message):
    with pytest.raises(ValueError, match=r"config\.objective\..*" + message):
        objectives.make(ConfigDict({"name": "pointwise", "attributes": ("quality",), **keys}))


def record(**attributes):
    k = len(next(iter(attributes.values())))
    conversations = tuple(
        ({"role": "user", "content": "q"}, {"role": "assistant", "content": str(i)}) for i in range(k)
    )
    nothing = np.zeros((k, k), np.float32)
    return Record(conversations, nothing, nothing, nothing, attributes=attributes)


def test_the_task_hands_over_labels_within_their_scales():
    task = make().task
    assert task == Attributes(TWO, SCALES)
    (example,) = task.examples(record(helpfulness=(0, math.nan), other=(9, 9), verbosity=(6, 2.5)))
    assert example.labels["value"].tolist() == [[0, 6], [0, 2.5]] and example.labels["mask"].tolist() == [
        [1, 1],
        [0, 1],
    ]
    with pytest.raises(BadRow, match="verbosity is 0, its scale goes from 1 to 6") as bad:
        task.examples(record(helpfulness=(0, 1), verbosity=(6, 0)))
    assert bad.value.reason == "out_of_scale"
    with pytest.raises(BadRow, match="one of the attributes helpfulness, verbosity"):
        task.examples(record(other=(1, 2)))


def test_an_attribute_that_no_row_has_is_refused(tmp_path):
    config = runpy.run_path(str(ROOT / "configs" / "pointwise_tiny.py"))["get_config"]()
    config.data.train = config.data.validation = "synthetic://scores?n=40"
    config.data.max_bad_fraction = 1.0
    config.data.cache_dir, config.objective.attributes = str(tmp_path), ("relevance", "nope")
    config.data.max_bad_fraction = 0.2  # of rows that lack relevance, which is all that is left of them
    with pytest.raises(ValueError, match="no training group has nope"):
        training.run(config, tmp_path / "run", dry_run=True)

"""Pairwise judging against torch and sklearn, hand-worked orders, and gradients by finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up_answers import metrics_of, sums_of
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax import objectives
from rmjax.data.records import pair
from rmjax.objectives import sums as sums_lib
from rmjax.objectives.pairwise import Pairwise, average_orders

A, B, TIE = np.eye(3)


def make_batch(z_BGKC, verdict_BGC, strength=None, weight=None):
    """Outputs [B, E, C] in a shuffled order with two absent ends, and the batch; verdicts are of the first order."""
    z, verdict = np.asarray(z_BGKC), np.asarray(verdict_BGC)
    b, g, k, c = z.shape
    order = np.random.default_rng(0).permutation(g * k + 2)  # the last two are absent
    there = order < g * k
    flat = np.concatenate([z.reshape(b, g * k, c), np.full((b, 2, c), 7.0)], 1)[:, order]
    swap = [1, 0, 2][:c]
    batch = {
        "end": np.tile(np.where(there, order, -1), (b, 1)),
        "end_group": np.tile(np.where(there, order // k, -1), (b, 1)),
        "end_slot": np.tile(np.where(there, order % k, -1), (b, 1)),
        "verdict": np.stack([verdict, verdict[..., swap]], 2).astype(z.dtype),
        "strength": np.full((b, g, 1), np.nan) if strength is None else np.asarray(strength)[..., None],
        "weight": np.ones((b, g)) if weight is None else np.asarray(weight),
    }
    return flat, batch


def measure(objective, z, verdict, **kwargs):
    return metrics_of(objective, *make_batch(z, verdict, **kwargs))


def random_case(classes=3, b=3, g=5, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(b, g, 2, classes)).astype(np.float32) * 2
    return (
        z,
        rng.dirichlet(np.ones(classes), (b, g)),
        rng.choice([np.nan, 0, 1, 2, 3], (b, g)),
        rng.uniform(0, 2, (b, g)),
    )


def both_orders(verdict):
    """Labels [n, C] of both orders, as test cases are flattened."""
    return np.stack([verdict, verdict[..., [1, 0, 2][: verdict.shape[-1]]]], 2).reshape(-1, verdict.shape[-1])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_loss_is_the_cross_entropy_of_torch(classes, smoothing):
    import torch
    import torch.nn.functional as F

    z, verdict, _, weight = random_case(classes)
    hard = np.eye(classes)[verdict.argmax(-1)]
    for labels in (verdict, hard):
        each = F.cross_entropy(
            torch.tensor(z.reshape(-1, classes)),
            torch.tensor(both_orders(labels), dtype=torch.float32),
            reduction="none",
            label_smoothing=smoothing,
        ).numpy()
        w = np.repeat(weight.ravel(), 2)
        values = measure(Pairwise(classes=classes, label_smoothing=smoothing), z, labels, weight=weight)
        assert values["loss"] == pytest.approx((w * each).sum() / w.sum(), rel=1e-5)


def test_strength_as_weight():
    z, verdict, strength, weight = random_case()
    plain, by_strength = Pairwise(), Pairwise(strength="weight", strength_scale=0.5)
    factor = np.where(np.isnan(strength), 1.0, 0.5 * strength)  # unknown strength and ties: as it is
    values = measure(by_strength, z, verdict, strength=strength, weight=weight)
    expected = measure(plain, z, verdict, weight=weight * factor)
    assert values["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert values["accuracy"] == measure(plain, z, verdict, weight=weight)["accuracy"]  # metrics ask all pairs alike


@pytest.mark.parametrize(
    ("classes", "verdict", "strength", "expected"),
    [
        (3, [1, 0, 0], 1, [0.731059, 0, 0.268941]),  # sigmoid(1); HelpSteer3's "slightly better" is next to a tie
        (3, [0, 1, 0], 2, [0, 0.880797, 0.119203]),
        (3, [1, 0, 0], 3, [0.952574, 0, 0.047426]),
        (3, [0, 0, 1], np.nan, [0, 0, 1]),
        (3, [1, 0, 0], np.nan, [1, 0, 0]),  # not known
        (3, [1, 0, 0], 0, [0.5, 0, 0.5]),  # stated
        (2, [0, 1], 1, [0.268941, 0.731059]),
        (2, [0.5, 0.5], np.nan, [0.5, 0.5]),
    ],
)
def test_strength_as_soft_label(classes, verdict, strength, expected):
    z = random_case(classes, 1, 1)[0]
    values = measure(Pairwise(classes=classes, strength="soft"), z, [[verdict]], strength=[[strength]])
    assert values["loss"] == pytest.approx(measure(Pairwise(classes=classes), z, [[expected]])["loss"], abs=1e-5)


def test_metrics_are_those_of_sklearn():
    import sklearn.metrics
    import torch

    z, verdict, _, _ = random_case(b=4, g=50)
    labels, decisions = both_orders(np.eye(3)[verdict.argmax(-1)]).argmax(-1), z.reshape(-1, 3).argmax(-1)
    values = measure(Pairwise(), z, verdict)
    assert values["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, decisions))
    recalls = sklearn.metrics.recall_score(labels, decisions, average=None)
    for c, name in enumerate(("A", "B", "tie")):
        assert values[f"recall_{name}"] == pytest.approx(recalls[c])
        assert values[f"labels_{name}_count"] == (labels == c).sum()
        assert values[f"predictions_{name}_count"] == (decisions == c).sum()
    p = torch.softmax(torch.tensor(z.reshape(-1, 2, 3)), -1).numpy()
    averaged = ((p[:, 0] + p[:, 1][:, [1, 0, 2]]) / 2).argmax(-1)
    assert values["accuracy_averaged"] == pytest.approx((averaged == labels[::2]).mean())
    assert values["pairs"] == 200


# Logits of both orders as they are read, each saying what its name says.
SAYS = {
    "A": [3.0, 0.0, 0.0],
    "B": [0.0, 3.0, 0.0],
    "tie": [0.0, 0.0, 3.0],
    "a": [1.0, 0.0, 0.0],
    "A=B": [1.0, 1.0, 0.0],
}


@pytest.mark.parametrize(
    ("first", "second", "label", "consistent", "accuracy", "averaged"),
    [
        ("A", "B", A, 1, 1, 1),  # both say that the first response is better
        ("B", "A", A, 1, 0, 0),
        ("tie", "tie", TIE, 1, 1, 1),
        ("A", "A", A, 0, 0.5, 0.5),  # prefers whatever comes first, equally sure: averaging leaves an even choice
        ("B", "B", A, 0, 0.5, 0.5),
        ("A", "tie", A, 0, 0.5, 0.5),
        ("a", "A", B, 0, 0.5, 1),  # the surer order decides
        ("a", "A", A, 0, 0.5, 0),
        ("a", "tie", TIE, 0, 0.5, 1),
        ("A=B", "A", A, 0, 0.25, 0),  # an even choice is a tie to the consistency; for the accuracy it is shared
    ],
)
def test_what_two_orders_say_together(first, second, label, consistent, accuracy, averaged):
    values = measure(Pairwise(), [[[SAYS[first], SAYS[second]]]], [[label]])
    assert values["consistency"] == consistent and values["accuracy"] == accuracy
    assert values["accuracy_averaged"] == averaged


def test_even_labels_count_for_consistency_only():
    z = np.array([[[[3.0, 0.0], [0.0, 3.0]], [[3.0, 0.0], [3.0, 0.0]]]])
    values = measure(Pairwise(classes=2, ties="half"), z, [[[0.5, 0.5], [1.0, 0.0]]])
    assert values["consistency"] == 0.5 and values["accuracy"] == 0.5 and values["pairs"] == 2
    assert values["labels_A_count"] == values["labels_B_count"] == 1 and values["predictions_A_count"] == 3


@pytest.mark.parametrize("options", [{}, {"strength": "soft"}, {"strength": "weight"}, {"classes": 2}])
def test_swapping_a_records_responses_changes_nothing_but_names(options):
    objective = Pairwise(**options)
    z, verdict, strength, weight = random_case(objective.classes)
    swap = [1, 0, 2][: objective.classes]
    one = measure(objective, z, verdict, strength=strength, weight=weight)
    # The other way round the same two questions are asked, so the model's outputs change places.
    other = measure(objective, z[:, :, ::-1], verdict[..., swap], strength=strength, weight=weight)
    assert one == pytest.approx(other, rel=1e-6)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    first, second = p[:, :, 0], p[:, :, 1]
    np.testing.assert_array_equal(average_orders(second, first), average_orders(first, second)[..., swap])


def test_average_of_orders_by_hand():
    first, second = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.75, 0.0]])
    np.testing.assert_array_equal(average_orders(first, second), [[0.625, 0.25, 0.125]])
    np.testing.assert_array_equal(average_orders(first[:, :2], second[:, :2]), [[0.625, 0.25]])
    np.testing.assert_array_equal(average_orders(jnp.asarray(first), jnp.asarray(second)), [[0.625, 0.25, 0.125]])
    for wrong in (second[0], np.ones((1, 4))):
        with pytest.raises(ValueError, match=r"expected twice \[..., 2\] or \[..., 3\]"):
            average_orders(wrong if wrong.shape[-1] == 4 else first, wrong)


def test_absent_groups_and_ends_count_nothing():
    z, verdict, strength, weight = random_case()
    weight[:, -2:] = 0
    some = measure(Pairwise(strength="soft"), z, verdict, strength=strength, weight=weight)
    cut = [x[:, :-2] for x in (z, verdict, strength, weight)]
    assert some == pytest.approx(measure(Pairwise(strength="soft"), *cut[:2], strength=cut[2], weight=cut[3]), rel=1e-5)
    nothing = measure(Pairwise(), z, verdict, weight=0 * weight)
    assert "loss" not in nothing and "accuracy" not in nothing and nothing["pairs"] == 0


def test_sums_add_over_any_split():
    z, verdict, strength, weight = random_case(b=6)
    objective = Pairwise(strength="weight")
    flat, batch = make_batch(z, verdict, strength, weight)
    whole, total = sums_of(objective, flat, batch), {}
    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        part = sums_of(objective, flat[rows], {name: x[rows] for name, x in batch.items()})
        total = sums_lib.add(total, part) if total else part
    assert sums_lib.to_metrics(total) == pytest.approx(sums_lib.to_metrics(whole), rel=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("options", [{}, {"strength": "soft", "label_smoothing": 0.1}, {"strength": "weight"}])
def test_gradients_by_finite_differences(classes, options):
    objective = Pairwise(classes=classes, **options)
    z, verdict, strength, weight = random_case(classes, 1, 2)
    with jax.enable_x64(True):
        flat, batch = make_batch(z.astype(np.float64), verdict, strength, weight)
        loss = lambda x: objective.loss_sums(x, batch, {})[0]
        gradient = np.asarray(jax.jit(jax.grad(loss))(flat))
        steps = 1e-6 * np.eye(flat.size).reshape(-1, *flat.shape)
        numeric = jax.jit(jax.vmap(lambda step: (loss(flat + step) - loss(flat - step)) / 2e-6))(steps)
    assert gradient.dtype == np.float64 and np.abs(gradient).max() > 0.1
    np.testing.assert_allclose(gradient.ravel(), numeric, atol=1e-8)


@pytest.mark.parametrize("size", [1e4, 88.0, 0.0])
def test_finite_for_any_output(size):
    import torch
    import torch.nn.functional as F

    flat, batch = make_batch(np.array([[[[size, -size, 0.0], [-size, size, 0.0]]]], np.float32), [[B]])
    value, gradient = jax.value_and_grad(lambda x: Pairwise().loss_sums(x, batch, {})[0])(jnp.asarray(flat))
    expected = F.cross_entropy(torch.tensor([[size, -size, 0.0]], dtype=torch.float64), torch.tensor([1]))
    assert np.isfinite(gradient).all() and value == pytest.approx(2 * expected.item(), rel=1e-5)


def test_shapes_that_would_broadcast_are_refused():
    z, verdict, _, _ = random_case()
    flat, batch = make_batch(z, verdict)
    for wrong in ({"verdict": batch["verdict"][..., :2]}, {"strength": batch["strength"][..., 0]}):
        with pytest.raises(ValueError, match=r"not \[B,E,3\]"):
            Pairwise().loss_sums(flat, batch | wrong, {})
    with pytest.raises(ValueError, match=r"not \[B,E,2\]"):
        Pairwise(classes=2).loss_sums(flat, batch, {})


def test_decoded_outputs_are_the_softmax_by_name():
    import torch

    outputs = np.array([[1.0, 2.0, 0.5], [1e4, -1e4, 0.0]], np.float32)
    decoded = Pairwise().decode(outputs, {})
    assert tuple(decoded) == Pairwise().labels == ("A", "B", "tie")
    np.testing.assert_allclose(
        np.stack(list(decoded.values()), -1), torch.softmax(torch.tensor(outputs), -1), atol=1e-7
    )
    assert tuple(Pairwise(classes=2).decode(outputs[:, :2], {})) == Pairwise(classes=2).labels == ("A", "B")


def test_made_from_the_config_and_from_an_exports_terms(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ response_a }} or {{ response_b }}{% if ties %}?{% endif %}")
    config = config_lib.defaults("pairwise")
    config.objective.template = str(tmp_path / "mine.jinja")
    config.objective.strength = "soft"
    objective = objectives.make(config.objective)
    assert config.checkpoint.metric == "validation/accuracy_averaged"
    again = objectives.make({"name": "pairwise", **objective.terms()})
    (tmp_path / "mine.jinja").unlink()  # an export goes without it
    record = pair([{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "y"}])
    assert again.task.examples(record)[0].conversations[0][0]["content"] == "x or y?"
    assert dataclasses.replace(again, template="") == Pairwise(strength="soft")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": 4}, "config.objective.classes=4 is none of"),
        ({"ties": "both"}, "config.objective.ties='both'"),
        ({"strength": "hard"}, "config.objective.strength='hard'"),
        ({"strength_scale": 0.0}, "config.objective.strength_scale=0.0"),
        ({"label_smoothing": 1.0}, "config.objective.label_smoothing=1.0"),
        ({"template": "nowhere.jinja"}, "config.objective.template: there is no judging template nowhere.jinja"),
        ({"template": "{{ response_a }}"}, "config.objective.template: .* does not show response_b"),
    ],
)
def test_values_that_cannot_be_used(options, said):
    with pytest.raises(ValueError, match=said):
        objectives.make(ConfigDict({"name": "pairwise", **options}))

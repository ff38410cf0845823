"""Schedules against torch and transformers; AdamW with regex lists against torch; Adafactor and Muon against optax."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

from rmjax import sharding
from rmjax.config import defaults, filled
from rmjax.inference import parameters
from rmjax.sharding import path_name
from rmjax.train import optim


def config(**values):
    c = filled(defaults()).optim
    c.update(values)
    return c


def torch_rates(make, steps):
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_and_linear_fall_as_transformers_do():
    for name, make in (
        ("cosine", lambda o: transformers.get_cosine_schedule_with_warmup(o, 0, 50)),
        ("linear", lambda o: transformers.get_linear_schedule_with_warmup(o, 0, 50)),
    ):
        rate = optim.schedule(config(schedule=name, learning_rate=1.0), 50, 0, 0)
        assert np.allclose([float(rate(s)) for s in range(50)], torch_rates(make, 50), atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_ends_at_zero_with_the_last_step(name):  # NUMERICS 13
    rate = optim.schedule(config(schedule=name, learning_rate=2.0), 40, 4, 10)
    rates = [float(rate(s)) for s in range(41)]
    assert rates[40] == pytest.approx(0, abs=1e-7) and 0 < rates[39] == min(rates[3:40])
    assert rates[3] == max(rates) == 2.0 and rates[0] == 0.5


def test_wsd_is_flat_between_and_constant_stays():
    rate = optim.schedule(config(schedule="wsd", learning_rate=1.0), 40, 4, 10)
    assert all(float(rate(s)) == 1.0 for s in range(3, 31)) and float(rate(35)) == pytest.approx(0.5)
    rate = optim.schedule(config(schedule="constant", learning_rate=1.0), 40, 0, 0)
    assert float(rate(39)) == 1.0


def test_warmup_must_fit():
    with pytest.raises(ValueError, match="warm-up of 50 steps"):
        optim.schedule(config(), 40, 50, 0)


def params():
    rng = np.random.default_rng(0)
    make = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    layers = {"q": {"kernel": make(2, 3, 4), "bias": make(2, 4)}, "norm": {"scale": make(2, 3)}}
    return {
        "decoder": {"embed": {"embedding": make(5, 3)}, "layers": layers},
        "score": {"kernel": make(3, 1)},
    }


def flat(tree):
    return {path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def gradients(step, name, shape):
    return np.random.default_rng((step, len(name))).normal(size=shape).astype(np.float32)


def run(c, steps=5, lr=0.1, p=None):
    tx, p = optim.make(c), params() if p is None else p
    split = functools.partial(parameters.split, SimpleNamespace(optim=c))
    state = tx.init(split(p)[0])

    @jax.jit
    def update(p, state, grads, step):
        (trained, frozen), (grads, _) = split(p), split(grads)
        updates, state = tx.update(optim.clipped(c, grads, optax.tree.norm(grads)), state, trained)
        return parameters.join(optim.apply(trained, updates, lr, 0, step), frozen), state

    for step in range(steps):
        draw = lambda path, x, step=step: gradients(step, path_name(path), x.shape)
        p, state = update(p, state, jax.tree_util.tree_map_with_path(draw, p), step)
    return flat(p), state


def torch_run(decayed, factors, clip, steps=5, lr=0.1, wd=0.1):
    import torch

    start = flat(params())
    weights = {k: torch.tensor(x, requires_grad=True) for k, x in start.items()}
    sets = [
        {"params": [w], "weight_decay": wd if decayed(k) else 0.0, "lr": lr * factors(k)} for k, w in weights.items()
    ]
    optimizer = torch.optim.AdamW(sets, betas=(0.9, 0.95), eps=1e-8)
    for step in range(steps):
        for k, w in weights.items():
            w.grad = torch.tensor(gradients(step, k, start[k].shape))
        if clip:
            torch.nn.utils.clip_grad_norm_(list(weights.values()), clip)
        optimizer.step()
    return {k: w.detach().numpy() for k, w in weights.items()}


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_adamw_with_decay_and_rate_lists_equals_torch(clip):
    factors = ((r".*/embedding", 0.25), (r"score/.*", 2.0), (r".*", 1.0))
    ours, _ = run(config(weight_decay=0.1, clip_norm=clip, lr_factors=factors))
    factor = lambda k: 0.25 if k.endswith("embedding") else 2.0 if k.startswith("score") else 1.0
    theirs = torch_run(lambda k: k.endswith(("kernel", "embedding")), factor, clip)
    for name, value in theirs.items():
        assert np.allclose(ours[name], value, atol=2e-5), name


NAMES = ["adamw", "adafactor", "muon"]


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_stay_and_have_no_state(name):
    ours, state = run(config(name=name, weight_decay=0.1, freezes=((r".*/(embedding|q/kernel)", True), (r".*", False))))
    start = flat(params())
    for frozen in ("decoder/embed/embedding", "decoder/layers/q/kernel"):
        assert np.array_equal(ours[frozen], start[frozen])
        assert not any(path.endswith(frozen) for path in flat(state))
    assert not np.array_equal(ours["score/kernel"], start["score/kernel"])


@pytest.mark.parametrize("name", NAMES)
def test_decay_and_rate_lists_mean_the_same_under_every_optimizer(name):
    """From the definition: p <- p - rate factor (u + decay p), with u the update of a run without either."""
    plain, _ = run(config(name=name, clip_norm=0.0), steps=1)
    factors = ((r".*/(embedding|q/kernel)", 0.25), (r".*", 1.0))
    ours, _ = run(config(name=name, clip_norm=0.0, weight_decay=0.1, lr_factors=factors), steps=1)
    for path, start in flat(params()).items():
        decay, factor = (
            0.1 * path.endswith(("kernel", "embedding")),
            0.25 if "embed" in path or "q/kernel" in path else 1,
        )
        assert np.allclose(ours[path], start - factor * (start - plain[path] + 0.1 * decay * start), atol=1e-6), path


# Adafactor and Muon


def large():
    """Two stacked layers and one by itself, large enough to be factored."""
    rng = np.random.default_rng(0)
    make = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    layers = {"up": {"kernel": make(2, 128, 160), "bias": make(2, 160)}, "norm": {"scale": make(2, 128)}}
    last = {"up": {"kernel": make(128, 160), "bias": make(160)}, "norm": {"scale": make(128)}}
    return {"decoder": {"embed": {"embedding": make(200, 128)}, "last": last, "layers": layers}}


def unstacked(tree):
    """{path of a layer's own parameter: array}, by hand, as optax's own optimizers take it."""
    split = lambda name, x: {f"{name}/{i}": x[i] for i in range(2)} if "layers" in name else {name: x}
    return {k: v for name, x in flat(tree).items() for k, v in split(name, x).items()}


def optax_run(tx, start, steps=5):
    p = {k: jnp.asarray(x) for k, x in start.items()}
    state, update = tx.init(p), jax.jit(tx.update)
    for step in range(steps):
        draw = lambda path, x, step=step: gradients(step, path_name(path), x.shape)
        grads = unstacked(jax.tree_util.tree_map_with_path(draw, large()))
        updates, state = update(grads, state, p)
        p = optax.apply_updates(p, updates)
    return p


def test_adafactor_of_stacked_layers_equals_optax_of_each():
    ours, state = run(config(name="adafactor", clip_norm=0.0, weight_decay=0.1), p=large())
    decayed = lambda tree: {k: "kernel" in k or "embedding" in k for k in tree}
    chain = optax.adafactor(
        0.1, multiply_by_parameter_scale=False, weight_decay_rate=0.1 * 0.1, weight_decay_mask=decayed
    )
    for name, value in optax_run(chain, unstacked(large())).items():
        got = unstacked(nested(ours))[name]
        assert np.allclose(got, value, atol=2e-5), name
    sizes = {k: v.shape for k, v in flat(state).items() if k.endswith("layers/up/kernel")}
    assert sorted(sizes.values()) == [(1,), (2, 128), (2, 160)]


def nested(flat_tree):
    """The inverse of `flat`."""
    tree = {}
    for name, x in flat_tree.items():
        *folders, last = name.split("/")
        where = tree
        for folder in folders:
            where = where.setdefault(folder, {})
        where[last] = x
    return tree


def test_muon_of_stacked_layers_equals_optax_of_each_and_the_rest_is_adamw():
    c = {"clip_norm": 0.0, "weight_decay": 0.1}
    ours, _ = run(config(name="muon", **c), p=large())
    adamw, _ = run(config(**c), p=large())
    numbers = {k: optax.contrib.MuonDimensionNumbers() if "kernel" in k else None for k in unstacked(large())}
    tx = optax.contrib.muon(0.1, weight_decay=0.1, muon_weight_dimension_numbers=numbers, consistent_rms=0.2)
    theirs, adamw = optax_run(tx, unstacked(large())), unstacked(nested(adamw))
    for name, value in unstacked(nested(ours)).items():
        wanted = theirs[name] if "kernel" in name else adamw[name]
        assert np.allclose(value, wanted, atol=1e-4 if "kernel" in name else 0), name


def test_updates_of_muon_are_as_large_as_those_of_adamw():
    """0.2 in the root mean square, what AdamW's have in practice; the Newton-Schulz steps give 0.7 to 1.2 of that."""
    ours, _ = run(config(name="muon", clip_norm=0.0), steps=1, lr=1.0, p=large())
    for name in ("decoder/layers/up/kernel", "decoder/last/up/kernel"):
        rms = np.sqrt(np.mean((ours[name] - flat(large())[name]) ** 2))
        assert 0.7 * 0.2 < rms < 1.2 * 0.2


def test_an_uncovered_parameter_is_an_error():
    with pytest.raises(ValueError, match="no decays rule matches parameter 'decoder/embed/embedding'"):
        run(config(decays=((r".*/kernel", True),)))


@pytest.mark.parametrize("name", NAMES)
def test_state_is_sharded_as_its_parameters(name):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    shapes = sharding.with_shardings(large(), sharding.param_shardings(mesh, large()))
    state = jax.eval_shape(optim.make(config(name=name)).init, shapes)
    got = optim.state_shardings(state, shapes, "replicated")
    known = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(shapes)}
    whole = 0
    for (path, x), s in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(got), strict=True):
        param = next((v for k, v in known.items() if path_name(path).endswith(k)), None)
        same = param is not None and param.shape == x.shape
        whole += same
        assert s == (param.sharding if same else "replicated"), path_name(path)
    # Both moments of all seven; Adafactor's second of the four vectors; Muon's one of two kernels, both of the rest.
    assert whole == {"adamw": 14, "adafactor": 4, "muon": 12}[name]


def test_rules_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ValueError, match=r"no parameter is decided by '\.\*embd\.\*'"):
        optim.check(config(freezes=((r".*embd.*", True), (r".*", False))), params())
    with pytest.raises(ValueError, match="nothing would be trained"):
        optim.check(config(freezes=((r".*", True),)), params())
    optim.check(config(), params())

"""Schedules against torch and transformers; AdamW with regex lists against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rmjax import optim
from rmjax.config import defaults
from rmjax.sharding import path_name


def config(**values):
    c = defaults().optim
    c.update(values)
    return c


def torch_rates(make, steps):
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


def run(c, steps=5, lr=0.1):
    tx, p = optim.make(c), params()
    state = tx.init(p)

    @jax.jit
    def update(p, state, grads):
        updates, state = tx.update(optim.trainable(c, grads), state, p)
        return jax.tree.map(lambda x, u: x - lr * u, p, updates), state

    for step in range(steps):
        draw = lambda path, x, step=step: gradients(step, path_name(path), x.shape)
        p, state = update(p, state, jax.tree_util.tree_map_with_path(draw, p))
    return flat(p), state


def torch_run(decayed, factors, clip, steps=5, lr=0.1, wd=0.1):
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


def test_frozen_parameters_stay_and_have_no_state():
    ours, state = run(config(weight_decay=0.1, freezes=((r".*/embedding", True), (r".*", False))))
    start = flat(params())
    assert np.array_equal(ours["decoder/embed/embedding"], start["decoder/embed/embedding"])
    assert not np.array_equal(ours["score/kernel"], start["score/kernel"])
    assert not any("embedding" in name for name in flat(state))


def test_an_uncovered_parameter_is_an_error():
    with pytest.raises(ValueError, match="no decays rule matches parameter 'decoder/embed/embedding'"):
        run(config(decays=((r".*/kernel", True),)))


def test_state_is_sharded_as_its_parameters():
    tx, p = optim.make(config()), params()
    names = {k: k for k in flat(p)}
    tags = jax.tree_util.tree_map_with_path(lambda q, _: path_name(q), p)
    got = flat(optim.state_shardings(jax.eval_shape(tx.init, p), tags, "replicated"))
    moments = {k: v for k, v in got.items() if v != "replicated"}
    assert len(moments) == 2 * len(names) and all(k.endswith(str(v)) for k, v in moments.items())
    assert any(v == "replicated" for v in got.values())


def test_rules_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ValueError, match=r"no parameter is decided by '\.\*embd\.\*'"):
        optim.check(config(freezes=((r".*embd.*", True), (r".*", False))), params())
    with pytest.raises(ValueError, match="nothing would be trained"):
        optim.check(config(freezes=((r".*", True),)), params())
    optim.check(config(), params())

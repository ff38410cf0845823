"""The policy gradient: its expectation against an enumerated policy, trees against separate rows, and torch."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import tiny_models
import torch

from rmjax.batches import actions, loader
from rmjax.batches.actions import Sample
from rmjax.batches.loader import Shape
from rmjax.models import heads, hf
from rmjax.models.config import from_hf
from rmjax.objectives.grpo import GRPO, advantages
from rmjax.train import step

WORDS = 3  # of the enumerated policy, which writes two of them after PROMPT
PROMPT = np.array([WORDS], np.int32)
ANSWERS = [np.array(pair, np.int32) for pair in itertools.product(range(WORDS), repeat=2)]
REWARD = np.array([0.0, 1.0, 0.25, 1.0, 0.5, 0.0, 0.0, 1.0, 0.0])  # of each answer


def policy(seed=0):
    rng = np.random.default_rng(seed)
    return {"first": jnp.array(rng.normal(size=WORDS)), "second": jnp.array(rng.normal(size=(WORDS, WORDS)))}


def log_probs(p, answer):
    first, second = jax.nn.log_softmax(p["first"]), jax.nn.log_softmax(p["second"], -1)
    return jnp.stack([first[answer[0]], second[answer[0], answer[1]]])


def nll(p, tokens):
    """Of the next token of each, [B, T], as a LanguageModel gives it."""
    following = jnp.roll(tokens, -1, axis=-1)
    table = jnp.concatenate([jax.nn.log_softmax(p["second"], -1), jax.nn.log_softmax(p["first"])[None]])
    return -table[tokens, jnp.minimum(following, WORDS - 1)]


def batch_of(groups, tokens=64, rows=1, objective=None):
    fields = tuple((objective or GRPO(target="score")).fields.items())
    shape = Shape(1, rows, tokens, max(len(groups), 1), 64, 64, fields)
    batch = loader.empty_rows(shape, rows)
    for b in range(rows):
        loader.fill_row(batch, b, groups[b::rows], fields)
    return batch


def estimate(p, drawn, objective, rewards=REWARD):
    """The gradient that a group of samples, numbers in ANSWERS, gives; NaN rewards are left out."""
    worth = rewards[list(drawn)]
    of = advantages(worth, objective.baseline)
    samples = [
        Sample(PROMPT, ANSWERS[k], known(p, ANSWERS[k]), a) for k, a, r in zip(drawn, of, worth) if not np.isnan(r)
    ]
    groups = actions.groups(samples, 1.0, float(len(samples)), 64, "row") if samples else []
    return of_batch(p, batch_of(groups, objective=objective), objective)


@functools.partial(jax.jit, static_argnums=2)
def of_batch(p, batch, objective):
    def loss(p):
        numerator, weight = objective.loss_sums({"nll": nll(p, batch["tokens"])}, batch, {})
        return numerator / jnp.maximum(weight, 1e-30)

    return jax.grad(loss)(p)


def known(p, answer):
    return np.array(PROBABILITY(p, answer))


PROBABILITY = jax.jit(log_probs)


def expected_reward(p, rewards=REWARD):
    probability = jnp.stack([jnp.exp(log_probs(p, answer).sum()) for answer in ANSWERS])
    return (probability * jnp.nan_to_num(rewards)).sum()


@pytest.mark.parametrize("baseline, share", [("others", 1.0), ("group", 2 / 3)])
def test_the_expectation_is_the_exact_gradient(baseline, share):
    """Over all 9^3 groups of three answers: the mean of the others gives the gradient of the expected reward, the mean
    of all with itself (K - 1) / K of it."""
    with jax.enable_x64(True):
        p, objective = policy(), GRPO(target="score", baseline=baseline)
        probability = np.array([np.exp(known(p, answer).sum()) for answer in ANSWERS])
        total = jax.tree.map(np.zeros_like, p)
        for drawn in itertools.combinations_with_replacement(range(len(ANSWERS)), 3):
            ways = len(set(itertools.permutations(drawn)))
            chance = ways * probability[list(drawn)].prod()
            total = jax.tree.map(lambda t, g, c=chance: t + c * np.asarray(g), total, estimate(p, drawn, objective))
        exact = jax.grad(expected_reward)(p)
        for name in p:
            np.testing.assert_allclose(-total[name], share * exact[name], atol=1e-6)


def test_a_group_learns_from_those_that_have_a_reward():
    """Three answers of which one is not to be trained on are two: neither its reward nor its tokens are there."""
    p, objective = policy(), GRPO(target="score")
    rewards = np.where(np.arange(9) == 4, np.nan, REWARD)
    kept = estimate(p, (1, 2), objective)
    with_dropped = estimate(p, (1, 4, 2), objective, rewards)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), kept, with_dropped)
    np.testing.assert_allclose(advantages(np.array([1.0, np.nan, 0.25]), "others"), [0.75, 0, -0.75])


def test_equal_rewards_teach_nothing():
    assert not advantages(np.full(8, 0.1), "others").any()
    assert not advantages(np.array([0.3, np.nan]), "others").any()
    assert not advantages(np.array([np.nan, np.nan]), "group").any()


def test_the_divergence_has_its_gradient():
    """On policy the expectation is the gradient of the divergence of each token's distribution, given those before it,
    by enumeration."""
    with jax.enable_x64(True):
        p, reference, objective = policy(0), policy(1), GRPO(target="score", kl=1.0)
        total = jax.tree.map(np.zeros_like, p)
        for answer in ANSWERS:
            (group,) = actions.groups([Sample(PROMPT, answer, known(p, answer), 0.0)], 1.0, 1.0, 64, "row")
            group.labels["reference"] = np.zeros(len(group.tree))
            batch = batch_of([group], objective=objective)
            batch["reference"] = batch["reference"].astype(np.float64)
            batch["reference"][0, :2] = known(reference, answer)
            chance = float(np.exp(known(p, answer).sum()))
            gradient = of_batch(p, batch, objective)
            total = jax.tree.map(lambda t, g, c=chance: t + c * np.asarray(g), total, gradient)

        def divergence(p):
            mine = [jax.nn.log_softmax(p[name], -1) for name in ("first", "second")]
            its = [jax.nn.log_softmax(reference[name], -1) for name in ("first", "second")]
            apart = [(jnp.exp(a) * (a - b)).sum(-1) for a, b in zip(mine, its)]
            return apart[0] + (jax.lax.stop_gradient(jnp.exp(mine[0])) * apart[1]).sum()

        for name, exact in jax.grad(divergence)(p).items():
            np.testing.assert_allclose(total[name], exact, atol=1e-6)


# Trees


def some_samples(rng, prompts, vocab, count=6, longest=9):
    """Answers of which some begin alike, or are equal; log-probabilities are far from the model's."""
    samples = []
    for prompt in prompts:
        answers = [rng.integers(1, vocab, rng.integers(1, longest)).astype(np.int32) for _ in range(count)]
        answers[1] = np.concatenate([answers[0][:3], rng.integers(1, vocab, 4)]).astype(np.int32)
        answers[2] = answers[1].copy()
        answers[3] = answers[1][:5]
        beginnings = lambda a: [a[:n].tobytes() for n in range(1, len(a) + 1)]
        olds_of = {begun: rng.normal(-4, 0.5) for answer in answers for begun in beginnings(answer)}
        olds = [np.array([olds_of[begun] for begun in beginnings(a)], np.float32) for a in answers]
        samples += [Sample(prompt, a, old, float(x)) for a, old, x in zip(answers, olds, rng.normal(size=count))]
    return samples


def gradient(objective, groups, graph, params, tokens, rows):
    batch = batch_of(groups, tokens, rows, objective)

    def loss(params):
        outputs = heads.merge(graph, params)(batch, remat="none")
        return objective.loss_sums(outputs, batch, {})[0]

    return jax.jit(jax.value_and_grad(loss), compiler_options=quick.OPTIONS)(params)


def language_model(family):
    """A tiny one of random weights: its config, graph and parameters."""
    config = from_hf({"model_type": family, **tiny_models.SIZES, **tiny_models.FAMILIES[family]})
    graph, _ = heads.abstract(config, 0, architecture="CausalLM")
    params = heads.init(config, 0, jnp.float32, architecture="CausalLM")
    rng = np.random.default_rng(0)
    return config, graph, jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), params)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])  # the second has a window
def test_a_tree_has_the_gradient_of_separate_rows(family):
    """Off policy, where ratios are clipped on both sides; both orders of a pair in one tree; a third of the tokens."""
    config, graph, params = language_model(family)
    rng, objective = np.random.default_rng(0), GRPO(target="pair")
    prompts = [rng.integers(1, config.vocab, n).astype(np.int32) for n in (17, 17)]
    prompts[1][:9] = prompts[0][:9]
    samples = some_samples(rng, prompts, config.vocab)
    together = actions.groups(samples, 1.0, 1.0, 512, "row")
    apart = [group for sample in samples for group in actions.groups([sample], 1.0, 1.0, 512, "row")]
    assert len(together) == 1 and sum(len(g.tree) for g in together) < 0.45 * sum(len(g.tree) for g in apart)
    parts = actions.groups(samples, 1.0, 1.0, 40, "row")
    assert len(parts) > 2 and max(len(g.tree) for g in parts) <= 40
    wanted, exact = gradient(objective, apart, graph, params, 64, len(apart))
    for groups, tokens, rows in ((together, 256, 1), (parts, 64, len(parts))):
        loss, found = gradient(objective, groups, graph, params, tokens, rows)
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(exact))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact)):
            np.testing.assert_allclose(a, b, atol=5e-6 * scale)


def test_the_loss_is_that_of_torch():
    """The clipped objective written per sample and token in torch, as PPO states it and TRL computes it."""
    rng, objective = np.random.default_rng(1), GRPO(target="score", clip=(0.2, 0.28))
    new, old = rng.normal(-1, 0.4, (5, 7)), rng.normal(-1, 0.4, (5, 7))
    advantage = rng.normal(size=(5, 1))
    ratio = torch.exp(torch.tensor(new - old))
    a = torch.tensor(advantage)
    wanted = -torch.minimum(ratio * a, torch.clamp(ratio, 0.8, 1.28) * a).sum()
    batch = {
        "loss_weight": np.ones((5, 7), np.float32),
        "up": np.broadcast_to(np.maximum(advantage, 0), (5, 7)),
        "down": np.broadcast_to(np.minimum(advantage, 0), (5, 7)),
        "old": old,
        "drawn": np.ones((5, 1, 1)),
    }
    found, weight = objective.loss_sums({"nll": jnp.array(-new)}, batch, {})
    np.testing.assert_allclose(found, float(wanted), rtol=1e-5)
    assert float(weight) == 5


def test_an_end_token_is_an_action_and_padding_is_told_by_lengths():
    """The id of the pad token within prompt and answer, and as its end."""
    pad = 0
    sample = Sample(np.array([5, pad, 6], np.int32), np.array([7, pad, 8, pad], np.int32), np.zeros(4, np.float32), 2.0)
    (group,) = actions.groups([sample], 1.0, 1.0, 64, "row")
    assert group.tree.tokens.tolist() == [5, 0, 6, 7, 0, 8, 0]
    assert group.labels["up"].tolist() == [0, 0, 2, 2, 2, 2, 0]  # at the token before each of its own
    assert group.labels["loss_weight"].tolist() == [0, 0, 1, 1, 1, 1, 0]


def test_log_probabilities_that_are_not_known_count_as_the_models_own():
    p, objective = policy(), GRPO(target="score")
    sample = lambda old: Sample(PROMPT, ANSWERS[3], np.array(old, np.float32), 1.0)
    gradients = []
    for old in (known(p, ANSWERS[3]), [np.nan, np.nan]):
        batch = batch_of(actions.groups([sample(old)], 1.0, 1.0, 64, "row"), objective=objective)
        gradients.append(of_batch(p, batch, objective))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *gradients)


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"target": "messages"}, "config.objective.target='messages' is none of pair, score"),
        ({"reward": "beter"}, "config.objective.reward='beter' is none of better, .* did you mean"),
        ({"clip": (0.2,)}, "config.objective.clip"),
        ({"updates": 0}, "config.objective.updates=0 must be at least 1"),
        ({"attributes": ("a", "b")}, "config.objective.attributes"),
        ({"template": "nothing.jinja"}, "config.objective.template"),
    ],
)
def test_what_cannot_be_is_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        GRPO(**keys).task  # noqa: B018


def test_micro_batches_change_nothing():
    """Gradient and loss of 1, 2 and 4 micro-batches, with empty ones after them that are not computed."""
    p, objective = policy(), GRPO(target="score")
    rng = np.random.default_rng(0)
    groups = []
    for drawn in ((0, 3, 1), (5, 7), (2, 1, 8, 1), (4, 3)):
        of = advantages(REWARD[list(drawn)], "others")
        samples = [Sample(PROMPT, ANSWERS[k], known(p, ANSWERS[k]) + rng.normal(0, 0.3), a) for k, a in zip(drawn, of)]
        groups += actions.groups(samples, 1.0, float(len(samples)), 64, "row")
    fields = tuple(objective.fields.items())

    def gradient_of(micro, empty):
        shape = Shape(micro + empty, 4 // micro, 64, 4, 64, 64, fields)
        local = range(shape.rows)
        batch = loader.fill([[i] for i in range(4)], SimpleNamespace(group=groups.__getitem__), shape, local)

        def loss(p, micro):
            pair = objective.loss_sums({"nll": nll(p, micro["tokens"])}, micro, {})
            return jnp.stack(pair), objective.outcomes({"nll": nll(p, micro["tokens"])}, micro, {})

        grads, sums = jax.jit(functools.partial(step.accumulate, loss, varies=True), compiler_options=quick.OPTIONS)(
            p, batch
        )
        tokens = np.asarray(sums["outcomes"]["tokens"])
        assert tokens.shape == (micro + empty, 4 // micro) and not tokens[micro:].any()
        return grads, sums["loss"]

    wanted = gradient_of(1, 0)
    for micro, empty in ((1, 1), (2, 0), (2, 3), (4, 1)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradient_of(micro, empty), wanted
        )


def test_five_adamw_steps_are_those_of_torch(tmp_path):
    """The same answers and rewards: one tree here, and in transformers a row for each, with the clipped objective as
    TRL's GRPOTrainer computes it (per token, min of both products), written out in torch."""
    theirs = tiny_models.make_hf_model("qwen2", tmp_path, head=False)
    config = from_hf(hf.read_config(tmp_path))
    graph, shapes = heads.abstract(config, 0, architecture="CausalLM")
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
    params, _ = hf.load(tmp_path, shapes, config, seed=0)
    rng, objective = np.random.default_rng(2), GRPO(target="score")
    prompt = rng.integers(1, 97, 12).astype(np.int32)
    drawn = some_samples(rng, [prompt], 97)
    of = advantages(np.array([1.0, 0, 0, 1, 0, 1]), "others")

    def old(tokens):
        ids = torch.tensor(np.concatenate([prompt, tokens])[None].astype(np.int64))
        with torch.no_grad():
            logits = theirs(ids).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()

    samples = [Sample(prompt, s.tokens, old(s.tokens), float(a)) for s, a in zip(drawn, of)]
    batch = batch_of(actions.groups(samples, 1.0, 6.0, 256, "row"), 256, 1, objective)
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    ours = optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01)
    state = ours.init(params)

    @functools.partial(jax.jit, compiler_options=quick.OPTIONS)
    def update(params, state):
        def loss(params):
            total, count = objective.loss_sums(heads.merge(graph, params)(batch, remat="none"), batch, {})
            return total / count

        updates, state = ours.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        params, state = update(params, state)
        optimizer.zero_grad()
        total = 0.0
        for sample in samples:
            ids = torch.tensor(np.concatenate([prompt, sample.tokens])[None].astype(np.int64))
            logits = theirs(ids).logits[0, len(prompt) - 1 : -1]
            new = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            ratio = torch.exp(new - torch.tensor(sample.log_probs))
            gain = torch.minimum(ratio * sample.advantage, torch.clamp(ratio, 0.8, 1.28) * sample.advantage)
            total = total - gain.sum()
        (total / 6).backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "after")
    after, _ = hf.load(tmp_path / "after", shapes, config, seed=0)
    moved = 0.0
    first, _ = hf.load(tmp_path, shapes, config, seed=0)
    for a, b, c in zip(*map(jax.tree.leaves, (params, after, first))):
        np.testing.assert_allclose(a, b, atol=1e-4)
        moved = max(moved, float(jnp.abs(b - c).max()))
    assert moved > 2e-3

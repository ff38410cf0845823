"""Our decoder against transformers on tiny random models: outputs, gradients and ten optimizer steps.

transformers runs every conversation alone; ours runs them as trees packed into rows.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from tiny_models import make_hf_model, random_groups, tree_rows

from rmjax.models import heads, hf
from rmjax.models.config import MOST, REQUIRED, from_hf, parameter_count
from rmjax.models.decoder import SAVED
from rmjax.models.rope import rope_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
UPPER = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
TWO_ROPES = {
    "full_attention": LINEAR,
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
CASES = {
    "qwen2": ("qwen2", {}),
    "qwen2 with a window on its upper layers": ("qwen2", {**UPPER, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama with yarn": ("llama", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "llama with linear scaling": ("llama", {"rope_parameters": LINEAR, "num_key_value_heads": 1}),
    "mistral": ("mistral", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {"rope_parameters": TWO_ROPES}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {}),
    "olmo3": ("olmo3", {"rope_parameters": {**TWO_ROPES, "full_attention": YARN}}),
}
PAIRS = random_groups(seed=1, groups=5)
ROWS = [PAIRS[:3], PAIRS[3:]]  # the second row ends in padding and has fewer scored tokens
BATCH = tree_rows(ROWS, row_tokens=160)
WHERE = ("tokens", "positions", "visible_from", "visible_until")
STEPS = 10
ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def in_parts(named, rows, layers=3):
    """The tensors with fused ones as the parts that the table names."""
    found, starts = dict(named), {}
    for row, leaf in rows.items():
        for name in row.names(layers):
            if (whole := name.partition("#")[0]) != name:
                size, start = row.shape(leaf)[0], starts.get(whole, 0)
                found[name], starts[whole] = named[whole][start : start + size], start + size
    assert all(starts[whole] == len(found.pop(whole)) for whole in starts)
    return found


def from_torch(named, rows, layers=3):
    """Our parameter paths from a dict of torch tensors by checkpoint name, by the table alone."""
    params, named = {}, in_parts(named, rows, layers)
    for row in rows:
        tensors = [named[name].detach().numpy() for name in row.names(layers)]
        array = np.stack(tensors) if row.stacked else tensors[0]
        params[row.path] = np.swapaxes(array, -1, -2) if row.transposed else array
    return params


def flat(params):
    return {hf.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


def torch_pass(model):
    """Hidden states and score of every conversation alone, and the Bradley-Terry loss over the pairs."""
    import torch

    hidden, scores = [], []
    for conversation in (c for pair in PAIRS for c in pair):
        out = model.model(torch.tensor([conversation]))
        hidden.append(out.last_hidden_state[0])
        scores.append(model(torch.tensor([conversation])).logits[0, 0])
    pairs = torch.stack(scores).reshape(-1, 2)
    return hidden, pairs, torch.nn.functional.softplus(pairs[:, 1] - pairs[:, 0]).mean()


def our_pass(params, graphdef, **options):
    """The loss, scores [pairs, 2] and hidden states [B, T, D], from the packed trees."""
    scorer = heads.merge(graphdef, params)
    scores_BEA = scorer(BATCH, **options)
    hidden_BTD = scorer.decoder.norm(scorer.decoder(*(BATCH[name] for name in WHERE)))
    pairs = scores_BEA[BATCH["end"] >= 0, 0].reshape(-1, 2)
    return jax.nn.softplus(pairs[:, 1] - pairs[:, 0]).mean(), (pairs, hidden_BTD)


class Case:
    """One model in both frameworks, and what both make of the same pairs."""

    def __init__(self, name, directory):
        family, overrides = CASES[name]
        self.torch_model = make_hf_model(family, directory, **overrides)
        self.config = from_hf(hf.read_config(directory))
        self.graphdef, shapes = heads.abstract(self.config, outputs=1)
        self.params, self.head = hf.load(directory, shapes, self.config, seed=0)
        self.rows = hf.expected_rows(shapes, self.config)
        step = jax.value_and_grad(functools.partial(our_pass, graphdef=self.graphdef), has_aux=True)
        self.step = jax.jit(step, compiler_options=quick.OPTIONS)
        (self.loss, (self.scores, self.hidden)), grads = self.step(self.params)
        self.grads = flat(grads)
        self.torch_hidden, self.torch_scores, self.torch_loss = torch_pass(self.torch_model)
        self.torch_loss.backward()


SLOW = ("qwen2", "llama with linear scaling")  # what they add is in the other cases, or in the rope test
RELEASE = ("olmo2",)  # olmo3 is that and more
marks = lambda name: [pytest.mark.slow] * (name in SLOW) + [pytest.mark.release] * (name in RELEASE)
IDS = [pytest.param(name, marks=marks(name)) for name in CASES]


@pytest.fixture(scope="module", params=IDS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("model"))


def test_hidden_states(case):
    index = 0
    for r, row in enumerate(ROWS):
        start, until = BATCH["visible_from"][r], BATCH["visible_until"][r]
        for end in BATCH["end"][r, : 2 * len(row)]:
            j = np.arange(end + 1)
            path = j[(j >= start[end]) & (end < until[j])]  # what the scored token sees is its conversation
            expected = case.torch_hidden[index].detach().numpy()
            np.testing.assert_allclose(case.hidden[r, path], expected, atol=1e-4, rtol=0)
            index += 1
    assert index == len(case.torch_hidden)


def test_scores_and_loss(case):
    assert case.head == "kept"
    np.testing.assert_allclose(case.scores, case.torch_scores.detach(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(case.loss, case.torch_loss.detach(), atol=1e-5, rtol=0)


def test_gradients(case):
    named = {name: parameter.grad for name, parameter in case.torch_model.named_parameters()}
    expected = from_torch(named, case.rows)
    assert expected.keys() == case.grads.keys()
    assert len(in_parts(named, case.rows)) == sum(len(row.names(case.config.layers)) for row in case.rows)
    for path, reference in expected.items():
        largest = np.abs(reference).max()
        assert largest > 0, path
        np.testing.assert_allclose(case.grads[path], reference, atol=1e-3 * largest, rtol=0, err_msg=path)


def test_ten_adamw_steps(case):
    import torch

    model = copy.deepcopy(case.torch_model)  # the other tests of this case see the weights that were loaded
    betas = (ADAM["b1"], ADAM["b2"])
    theirs = torch.optim.AdamW(
        model.parameters(), 1e-3, betas=betas, eps=ADAM["eps"], weight_decay=ADAM["weight_decay"]
    )
    for _ in range(STEPS):
        theirs.zero_grad()
        torch_pass(model)[2].backward()
        theirs.step()
    ours, params = optax.adamw(1e-3, **ADAM), case.params
    state = ours.init(params)

    @functools.partial(jax.jit, compiler_options=quick.OPTIONS)
    def update(params, state, grads):
        updates, state = ours.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = update(params, state, case.step(params)[1])
    for path, reference in from_torch(dict(model.named_parameters()), case.rows).items():
        np.testing.assert_allclose(flat(params)[path], reference, atol=1e-3, rtol=0, err_msg=path)


def test_the_last_layer_of_scored_tokens_alone_is_exact():
    """Some tokens asked for are the same one, as steps of a shared prefix are."""
    config = from_hf({**TINY, "model_type": "qwen3"})
    graphdef, _ = heads.abstract(config, 1)
    params = heads.init(config, 1, seed=4)
    at_BE = jnp.asarray(np.random.default_rng(0).integers(0, BATCH["tokens"].shape[1], (2, 9)).repeat(2, 1))
    slope_BED = jnp.asarray(np.random.default_rng(1).normal(size=(2, 18, config.width)), jnp.float32)

    def loss(params, pruned):
        decoder = heads.merge(graphdef, params).decoder
        x = decoder(*(BATCH[name] for name in WHERE), at=at_BE if pruned else None)
        x_BED = x if pruned else jnp.take_along_axis(x, at_BE[..., None], axis=1)
        return (slope_BED * x_BED).sum(), x_BED

    step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1, compiler_options=quick.OPTIONS)
    (grads, few), (expected, all_of) = step(params, True), step(params, False)
    np.testing.assert_allclose(few, all_of, rtol=1e-5, atol=1e-6 * np.abs(all_of).max())
    for path, grad in flat(expected).items():
        atol = 1e-5 * np.abs(grad).max()
        np.testing.assert_allclose(flat(grads)[path], grad, rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize("used", [(1, 4), (5, 2), (0, 0)])
def test_few_scored_tokens_in_many_places_are_exact(used):
    """Whether all rows fit in the first places or one does not."""
    config = from_hf({**TINY, "model_type": "qwen3"})
    graphdef, _ = heads.abstract(config, 1)
    scorer = heads.merge(graphdef, heads.init(config, 1, seed=4))
    end_BE = np.full((2, 32), -1)
    for row, count in enumerate(used):
        end_BE[row, :count] = np.random.default_rng(row).integers(0, BATCH["tokens"].shape[1], count)
    batch = {**{name: BATCH[name][:2] for name in WHERE}, "end": jnp.asarray(end_BE)}
    run = jax.jit(lambda few: scorer(batch, few=few, remat="none"), static_argnums=0)
    few, all_of = run(4), run(0)
    assert few.shape == all_of.shape == (2, 32, 1) and not few[end_BE < 0].any()
    np.testing.assert_allclose(few, all_of, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_remat_policies_and_unrolling_change_nothing(tmp_path):
    case = Case("qwen2 with a window on its upper layers", tmp_path)
    for options in ({"remat": "none"}, {"remat": "q, gate"}, {"scan": False}):
        step = jax.value_and_grad(functools.partial(our_pass, graphdef=case.graphdef, **options), has_aux=True)
        (loss, _), grads = jax.jit(step, compiler_options=quick.OPTIONS)(case.params)
        np.testing.assert_allclose(loss, case.loss, rtol=1e-6)
        for path, grad in flat(grads).items():
            np.testing.assert_allclose(grad, case.grads[path], atol=1e-5 * np.abs(grad).max(), rtol=0, err_msg=path)
    with pytest.raises(ValueError, match=r"names 'mlp'.*'none', 'full'.*gate, up"):
        our_pass(case.params, case.graphdef, remat="q,mlp")


def saved_bytes(config, remat):
    """Bytes of what the forward keeps for the backward."""
    graphdef, shapes = heads.abstract(config, 1)
    loss = lambda params: heads.merge(graphdef, params)(BATCH, remat=remat).sum()
    kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(loss, params)[1], shapes))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def test_remat_saves_what_it_names():
    config = from_hf({**TINY, "model_type": "qwen2"})
    full = saved_bytes(config, "full")
    # Bytes of one number of each token and layer; of the last layer only scored tokens count.
    numbers = (BATCH["tokens"].size * (config.layers - 1) + BATCH["end"].size) * 4
    widths = {"mid": config.width, "gate": config.mlp, "q": config.heads * config.head_dim}
    for name, width in widths.items():
        assert saved_bytes(config, name) - full == pytest.approx(numbers * width, rel=0.01)
    of_all = BATCH["tokens"].size * config.layers * 4
    attention = of_all * config.heads * (config.head_dim + 1)  # and its log-sum-exp
    assert saved_bytes(config, "attention") - full == pytest.approx(attention, rel=0.25)  # rows fill whole blocks
    assert saved_bytes(config, "none") > saved_bytes(config, ",".join(SAVED)) > full


def test_absent_scored_token_is_zero_without_gradient():
    config = from_hf({**TINY, "model_type": "llama"})
    graphdef, _ = heads.abstract(config, outputs=2)
    params = jax.jit(lambda: heads.init(config, 2, seed=3), compiler_options=quick.OPTIONS)()
    batch = {**BATCH, "end": np.full_like(BATCH["end"], -1)}
    total = lambda params: jnp.square(1 + heads.merge(graphdef, params)(batch)).sum()
    value, grads = jax.jit(jax.value_and_grad(total), compiler_options=quick.OPTIONS)(params)
    assert value == 2 * batch["end"].size
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_dtypes_bfloat16_model_float32_head():
    config = from_hf({**TINY, "model_type": "qwen3"})
    graphdef, shapes = heads.abstract(config, 1, jnp.bfloat16, jnp.bfloat16)
    params = jax.jit(lambda: heads.init(config, 1, jnp.bfloat16, seed=0))()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    dtypes = {path: leaf.dtype for path, leaf in flat(params).items()}
    assert dtypes.pop("score/kernel") == jnp.float32 and set(dtypes.values()) == {jnp.dtype("bfloat16")}
    scorer = heads.merge(graphdef, params)
    assert jax.eval_shape(scorer, BATCH).dtype == jnp.float32
    assert jax.eval_shape(scorer.decoder, *(BATCH[name] for name in WHERE)).dtype == jnp.bfloat16


def test_token_outside_the_vocabulary_cannot_pass():
    config = from_hf({**TINY, "model_type": "llama"})
    graphdef, _ = heads.abstract(config, 1)
    tokens = BATCH["tokens"].copy()
    tokens[0, 0] = config.vocab
    run = jax.jit(lambda batch: heads.merge(graphdef, heads.init(config, 1))(batch), compiler_options=quick.OPTIONS)
    scores_BEA = run({**BATCH, "tokens": tokens})
    assert np.isnan(scores_BEA[0, 0]).all() and np.isfinite(scores_BEA[1]).all()


def test_initialisation_is_that_of_transformers(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)  # else what is drawn depends on the tests before
    config = {**TINY, "model_type": "qwen3", "initializer_range": 0.07, "attention_bias": True}
    reference = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.for_model(**{**config, "num_labels": 1, "pad_token_id": None})
    )
    ours = from_hf(config)
    params = jax.jit(lambda: heads.init(ours, 1, seed=0), compiler_options=quick.OPTIONS)()
    expected = from_torch(dict(reference.named_parameters()), hf.expected_rows(params, ours))
    for path, leaf in flat(params).items():
        assert leaf.shape == expected[path].shape
        for moment in (np.mean, np.std):
            noise = 4 * 0.07 / np.sqrt(leaf.size)
            np.testing.assert_allclose(moment(leaf), moment(expected[path]), atol=noise, rtol=0, err_msg=path)
    total, rest = parameter_count(params)
    assert total == sum(p.numel() for p in reference.parameters())
    assert total - rest == reference.model.embed_tokens.weight.numel()


TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
QWEN_WINDOW = {"model_type": "qwen2", "sliding_window": 9, "max_window_layers": 2}
ROPES = [
    LLAMA3,
    YARN,
    LINEAR,
    {**YARN, "attention_factor": 0.7, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {**YARN, "mscale": 0.8, "mscale_all_dim": 0.4},
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},  # the original length is max_position_embeddings
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: "-".join(map(str, rope.values())))
def test_rope_frequencies_are_those_of_transformers(rope):
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    reference = transformers.LlamaConfig(**TINY, head_dim=64, rope_parameters=dict(rope))
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](reference, "cpu")
    scaling = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": {**scaling, "type": rope["rope_type"]}}
    for form in ({"rope_parameters": rope}, older):
        ours = from_hf({**TINY, "model_type": "llama", "head_dim": 64, **form})
        np.testing.assert_allclose(rope_frequencies(ours.ropes[0], 64), expected, rtol=1e-6)
        assert ours.ropes[0].attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (QWEN_WINDOW, (None, None, None)),
        ({**QWEN_WINDOW, "use_sliding_window": True}, (None, None, 9)),
        (
            {
                **QWEN_WINDOW,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", *["full_attention"] * 2],
            },
            (9, None, None),
        ),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0}, (4096, 4096, 4096)),
        ({"model_type": "mistral"}, (4096, 4096, 4096)),
        ({"model_type": "mistral", "sliding_window": None}, (None, None, None)),
        ({"model_type": "llama", "sliding_window": 7}, (None, None, None)),
    ],
)
def test_windows_are_those_of_transformers(config, windows):
    assert from_hf({**TINY, **config}).windows == windows


GEMMA3 = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
OLMO3 = {"rope_theta": 5e5, "rope_scaling": {**YARN, "rope_theta": 5e5, "original_max_position_embeddings": 8192}}


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("gemma3_text", {}),
        ("gemma3_text", GEMMA3),
        ("gemma3_text", {"rope_theta": 2e6}),
        ("olmo3", {}),
        ("olmo3", OLMO3),
        ("gemma2", {}),
        ("olmo2", {}),
    ],
)
def test_ropes_and_windows_by_type_are_those_of_transformers(family, given):
    import copy

    import transformers

    theirs = transformers.AutoConfig.for_model(family, **{**TINY, "num_hidden_layers": 8, **copy.deepcopy(given)})
    forms = ({**TINY, "num_hidden_layers": 8, **given}, theirs.to_dict())
    for form in forms:
        ours = from_hf({**form, "model_type": family})
        assert [window is not None for window in ours.windows] == [
            kind == "sliding_attention" for kind in getattr(theirs, "layer_types", ["full_attention"] * 8)
        ]
        assert set(ours.windows) - {None} <= {getattr(theirs, "sliding_window", None)}
        said = theirs.rope_parameters
        for rope, window in zip(ours.ropes, ours.windows):
            wanted = said.get("full_attention" if window is None else "sliding_attention", said)
            assert (rope.type, rope.theta) == (wanted["rope_type"], wanted["rope_theta"])
            assert rope.factor == wanted.get("factor", 1.0)
        assert ours.tied == theirs.tie_word_embeddings and ours.norm_eps == theirs.rms_norm_eps


def test_defaults_of_a_config():
    llama = from_hf({**TINY, "model_type": "llama", "num_key_value_heads": None})
    assert (llama.kv_heads, llama.head_dim, llama.ropes[0].theta, llama.norm_eps) == (4, 12, 10_000.0, 1e-6)
    assert not (llama.qkv_bias or llama.o_bias or llama.mlp_bias or llama.qk_norm)
    qwen2 = from_hf({**TINY, "model_type": "qwen2"})
    assert qwen2.qkv_bias and not qwen2.o_bias
    assert from_hf({**TINY, "model_type": "qwen3"}).head_dim == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "'bloom' is not supported.*qwen2, qwen3, llama, mistral"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": -1}, "query_pre_attn_scalar -1"),
        ({"hidden_size": None, "vocab_size": None}, "lacks vocab_size, hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; .* one of 'silu', 'gelu_pytorch_tanh'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ({"head_dim": 9}, "head_dim 9 must be even"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported.*at run time"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "new"}}, "unknown RoPE type 'new'; supported: default, linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "RoPE parameters by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "names sliding_attention, but"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf({**TINY, "model_type": "llama", **change})


@pytest.mark.parametrize("name", MOST)
def test_sizes_beyond_any_model_are_refused_at_once(name):
    values = {"model_type": "qwen2", **dict.fromkeys(REQUIRED, 8), "num_key_value_heads": 8, "head_dim": 8}
    assert from_hf({**values, "num_hidden_layers": 2**12}).layers == 2**12
    with pytest.raises(ValueError, match=rf"has {name} 1000000000; the most is"):
        from_hf({**values, name: 10**9})

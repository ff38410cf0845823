"""The sampler against the tree forward, and against transformers' own generation."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import PAD, WRITERS, make_hf_model, tree_rows

from rmjax import sharding
from rmjax.inference import sampler
from rmjax.inference.sampler import Drawing, Prompt, Sampler
from rmjax.models import heads, hf
from rmjax.models.config import from_hf

CASES = {
    "qwen2": {},
    "qwen3": {"attention_bias": True},
    "llama": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
}  # others as tiny_models has them, with windows shorter than the prompts
EACH = [pytest.param(f, marks=[pytest.mark.release] * (f == "olmo2")) for f in WRITERS]  # olmo3 is that and more
DRAWING = Drawing(responses=3, max_tokens=20)
STOPS = (7, PAD)


def prompts(count=5, seed=0):
    rng = np.random.default_rng(seed)
    return [Prompt(rng.integers(1, 97, rng.integers(2, 30)).tolist(), row) for row in range(count)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(torch module, config, parameters) by family."""
    made = {}

    def of(family):
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            torch_model = make_hf_model(family, directory, head=False, **CASES.get(family, {}))
            config = from_hf(hf.read_config(directory))
            _, shapes = heads.abstract(config, 0, architecture="CausalLM")
            mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
            shapes = sharding.with_shardings(shapes, sharding.param_shardings(mesh, shapes))
            params, _ = hf.load(directory, shapes, config, seed=0)
            made[family] = torch_model, config, params, mesh
        return made[family]

    return of


def make(model, drawing=DRAWING, *, groups=2, stops=STOPS, chunk=8):
    _, config, params, mesh = model
    return Sampler(config, params, mesh, "float32", drawing, stops=stops, groups=groups, chunk=chunk)


def drawn(model, asked, drawing=DRAWING, **options):
    """The responses to each prompt, in their order."""
    found = dict(make(model, drawing, **options).responses(asked))
    assert sorted(found) == list(range(len(asked)))
    return [found[i] for i in range(len(asked))]


@pytest.mark.parametrize("family", EACH)
def test_log_probabilities_are_those_of_the_tree_forward(models, family):
    """To 1e-5 nats, or where float32 is coarser to twice what transformers' own float32 is from its float64; there on
    some processors: 9.5e-6 to 1.7e-5 with Gemma's large embeddings."""
    module, config, params, _ = models(family)
    graph, _ = heads.abstract(config, 0, architecture="CausalLM")
    forward = jax.jit(lambda params, batch: heads.inference_outputs(heads.merge(graph, params), batch))
    double, found = copy.deepcopy(module).double(), []
    for prompt, responses in zip(prompts(), drawn(models(family), prompts())):
        assert len({tuple(response.tokens) for response in responses}) > 1
        groups = [[[*prompt.tokens, *response.tokens.tolist()]] for response in responses]
        nll = forward(params, tree_rows([[group] for group in groups], 64))
        for row, (group,), response in zip(nll, groups, responses):
            first = len(prompt.tokens) - 1
            exact, rounded = (log_probs(m, group)[first:] for m in (double, module))
            found.append((response.log_probs, -row[first : first + len(response.tokens)], exact, rounded))
    sampled, whole, exact, rounded = map(np.concatenate, zip(*found))
    atol = max(1e-5, 2 * np.abs(rounded - exact).max())
    assert atol < 5e-5
    np.testing.assert_allclose(sampled, whole, rtol=0, atol=atol)
    np.testing.assert_allclose(sampled, exact, rtol=0, atol=atol)


def log_probs(module, tokens):
    """Of each token after the first, by transformers."""
    import torch

    ids = torch.tensor([tokens])
    with torch.no_grad():
        found = torch.log_softmax(module(ids).logits[0, :-1], -1)
    return found.gather(1, ids[0, 1:, None])[:, 0].numpy()


@pytest.mark.parametrize("family", EACH)
def test_the_likeliest_tokens_are_those_that_transformers_generates(models, family):
    import torch

    greedy = Drawing(max_tokens=12, temperature=0.0)
    for prompt, (response,) in zip(prompts(), drawn(models(family), prompts(), greedy)):
        theirs = models(family)[0].generate(
            torch.tensor([prompt.tokens]),
            attention_mask=torch.ones(1, len(prompt.tokens), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(STOPS),
        )
        assert response.tokens.tolist() == theirs[0, len(prompt.tokens) :].tolist()
        assert response.finish == ("stop" if response.tokens[-1] in STOPS else "length")


def test_what_stands_beside_a_prompt_changes_none_of_its_tokens(models):
    model, asked = models("qwen2"), prompts(7)
    first = drawn(model, asked)
    order = [4, 2, 6, 0, 5, 1, 3]
    again = drawn(model, [asked[i] for i in order])
    for i, theirs in zip(order, again):
        for one, other in zip(first[i], theirs):
            assert one.tokens.tolist() == other.tokens.tolist() and one.finish == other.finish
    for options in ({"groups": 5}, {"chunk": 3}):
        for ours, theirs in zip(first, drawn(model, asked, **options)):
            for one, other in zip(ours, theirs):
                assert one.tokens.tolist() == other.tokens.tolist()
                np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)


def test_few_prompts_get_few_groups_and_the_same_tokens(models):
    model, asked = models("qwen2"), prompts(7)
    asked[0] = Prompt([5] * 20, 0)  # all calls have room for as many tokens
    alike = [asked[i]._replace(tokens=(*asked[i].tokens, *range(1, 60))[:20]) for i in range(7)]
    one = make(model, groups=6)
    assert [one.groups_of(n) for n in range(1, 8)] == [1, 2, 4, 4, 6, 6, 6]
    together = dict(one.responses(alike))
    before = sampler._write._cache_size(), sampler._read._cache_size()
    for count in range(1, 7):
        for i, responses in one.responses(alike[:count]):
            for ours, theirs in zip(responses, together[i]):
                assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.finish == theirs.finish
                np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=2e-5)
    now = sampler._write._cache_size(), sampler._read._cache_size()
    assert all(more - had <= 3 for more, had in zip(now, before))  # for one, two and four groups


def test_a_prompt_is_read_with_room_for_its_own_length(models, monkeypatch):
    read, widths = sampler._read, []

    def spied(writer, params, prompt, tokens, lengths, where):
        widths.append(tokens.shape[1])
        return read(writer, params, prompt, tokens, lengths, where)

    monkeypatch.setattr(sampler, "_read", spied)
    asked = [Prompt([3 + n % 7 for n in range(length)], length) for length in (10, 200, 20, 90)]
    found = drawn(models("qwen2"), asked)
    assert widths == [256, 128, 64]
    for prompt, together in zip(asked, found):
        (alone,) = drawn(models("qwen2"), [prompt])
        for one, other in zip(together, alone):
            assert one.tokens.tolist() == other.tokens.tolist()
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)


def test_new_parameters_are_those_of_a_new_sampler_and_compile_nothing(models):
    _, config, params, mesh = model = models("qwen2")
    one, asked = make(model), prompts(4)
    old = dict(one.responses(asked))
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), params)
    programs = [f._cache_size() for f in (sampler._write, sampler._read, sampler._apart)]
    one.load(moved)
    ours = dict(one.responses(asked))
    assert [f._cache_size() for f in (sampler._write, sampler._read, sampler._apart)] == programs
    theirs = dict(make((None, config, moved, mesh)).responses(asked))
    one.load(params)
    again = dict(one.responses(asked))
    for i in range(len(asked)):
        for left, right in ((ours[i], theirs[i]), (again[i], old[i])):
            for a, b in zip(left, right):
                assert a.tokens.tolist() == b.tokens.tolist() and a.log_probs.tobytes() == b.log_probs.tobytes()
    assert any(a.tokens.tolist() != b.tokens.tolist() for i in old for a, b in zip(old[i], ours[i]))


def test_parameters_that_are_as_they_are_read_are_not_copied(models):
    _, config, params, mesh = models("qwen2")
    made = sampler.writing_params(params, config, mesh, "float32")
    at = lambda x: x.unsafe_buffer_pointer()
    assert at(made["decoder"]["embed"]["embedding"]) == at(params["decoder"]["embed"]["embedding"])
    jax.tree.map(
        lambda x, y: np.testing.assert_equal(at(x), at(y)), made["decoder"]["each"][-1], params["decoder"]["last"]
    )
    assert sampler.writing_params(made, config, mesh, "float32") is made
    half = sampler.writing_params(params, config, mesh, "bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(half)} == {"bfloat16"}


def test_a_response_ends_with_a_stop_or_at_the_limit(models):
    for responses in drawn(models("qwen2"), prompts(20, seed=3)):
        for response in responses:
            *before, last = response.tokens.tolist()
            assert not set(before) & set(STOPS)
            assert response.finish == ("stop" if last in STOPS else "length")
            assert response.finish == "stop" or len(response.tokens) == DRAWING.max_tokens


def test_the_caller_may_end_a_response(models):
    ended = lambda tokens: 5 if len(tokens) >= 5 else None
    found = dict(make(models("qwen2"), stops=()).responses(prompts(3), ended))
    assert {len(r.tokens) for of_one in found.values() for r in of_one} == {5}
    assert {r.finish for of_one in found.values() for r in of_one} == {"stop"}


def test_long_responses_get_more_room(models):
    drawing = Drawing(responses=1, max_tokens=150)
    (response,), *_ = drawn(models("qwen2"), prompts(1), drawing, stops=())
    assert len(response.tokens) == 150
    (short,), *_ = drawn(models("qwen2"), prompts(1), dataclasses.replace(drawing, max_tokens=60), stops=())
    assert response.tokens[:60].tolist() == short.tokens.tolist()


@pytest.mark.parametrize("drawing", [Drawing(), Drawing(temperature=0.5), Drawing(top_k=3), Drawing(top_p=0.6)])
def test_tokens_are_drawn_from_the_distribution_that_was_asked_for(drawing):
    logits = np.log([0.4, 0.3, 0.15, 0.1, 0.05]).astype(np.float32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(20_000))
    counts = np.bincount(sampler.draw(jnp.tile(logits, (20_000, 1)), keys, drawing), minlength=5) / 20_000
    wanted = np.exp(logits / drawing.temperature)
    kept = 3 if drawing.top_k else 2 if drawing.top_p < 1 else 5
    wanted = np.where(np.arange(5) < kept, wanted, 0) / wanted[:kept].sum()
    np.testing.assert_allclose(counts, wanted, atol=0.012)


def test_nothing_is_compiled_twice(models):
    one = make(models("qwen2"))
    dict(one.responses(prompts(4)))
    programs = sampler._write._cache_size(), sampler._read._cache_size()
    dict(one.responses(prompts(6, seed=9)))
    dict(make(models("qwen2"), dataclasses.replace(DRAWING, seed=5)).responses(prompts(6)))
    assert (sampler._write._cache_size(), sampler._read._cache_size()) == programs


@pytest.mark.parametrize("wrong", [{"responses": 0}, {"temperature": -1}, {"top_p": 0.0}, {"max_tokens": 0}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Drawing(**wrong)


# Long reasoning

LONG = {
    "qwen2": {},
    "gemma3_text": {"sliding_window": 1000, "layer_types": ["sliding_attention", "full_attention"]},
}
of_a_release = lambda *case: pytest.param(*case, marks=pytest.mark.release)
ROOM = 8_448  # of a row of training, in which prompt and response stand


@pytest.mark.parametrize(
    ("family", "length", "most"),
    [
        pytest.param("gemma3_text", 4_000, 4_300, marks=pytest.mark.slow),
        of_a_release("qwen2", 4_000, 4_300),
        *(of_a_release(family, *sizes) for family in LONG for sizes in ((60, 8_200), (8_150, 250))),
    ],
)
def test_long_responses_are_those_of_training(family, length, most, tmp_path):
    """Of more than 8,192 tokens with their prompts; by the forward pass of training, which recomputes its layers."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "max_position_embeddings": 16_384}
    make_hf_model(family, tmp_path, head=False, **sizes, **LONG[family])
    config = from_hf(hf.read_config(tmp_path))
    graph, shapes = heads.abstract(config, 0, architecture="CausalLM")
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    shapes = sharding.with_shardings(shapes, sharding.param_shardings(mesh, shapes))
    params, _ = hf.load(tmp_path, shapes, config, seed=0)
    prompt = Prompt(np.random.default_rng(0).integers(1, 97, length).tolist(), 0)
    drawing = Drawing(responses=2, max_tokens=most, temperature=5.0)  # else gemma repeats one token for ever
    one = Sampler(config, params, mesh, "float32", drawing, stops=(), groups=1)
    ((_, responses),) = one.responses([prompt])
    assert [len(response.tokens) for response in responses] == [most, most] and length + most > 8_192

    batch = tree_rows([[[[*prompt.tokens, *response.tokens.tolist()]]] for response in responses], ROOM)
    asked = slice(length - 1, length - 1 + most)  # whose next tokens are the response
    batch["loss_weight"] = np.zeros((2, ROOM), np.float32)
    batch["loss_weight"][:, asked] = 1
    forward = jax.jit(lambda params, batch: heads.merge(graph, params)(batch, remat="full")["nll"])
    for row, response in zip(forward(params, batch), responses):
        np.testing.assert_allclose(response.log_probs, -row[asked], rtol=0, atol=1e-4)
        assert np.ptp(response.log_probs[-200:]) > 1  # the end is no loop of one token

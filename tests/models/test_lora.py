"""LoRA against PEFT and torch: outputs, every adapter's gradient, ten optimizer steps, and directories in and out."""

import functools
import json

import jax
import numpy as np
import optax
import pytest
import quick
from test_models import ADAM, CASES, STEPS, flat, our_pass, torch_pass
from tiny_models import make_hf_model

from rmjax import objectives, sharding
from rmjax.config import defaults, filled
from rmjax.inference import parameters
from rmjax.models import hf, peft

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
RANK, ALPHA = 4, 12.0


def make_adapter(family, tmp_path, head=True, **options):
    """A base without a head and a random adapter of it, in PEFT's files; returns PEFT's model."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    name, overrides = CASES[family]
    make_hf_model(name, tmp_path / "base", head=False, **overrides)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, attn_implementation="eager"
    )
    asked = {"r": RANK, "lora_alpha": ALPHA, "target_modules": FUSED if name == "phi3" else LINEAR, **options}
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"] if head else None, **asked))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.requires_grad and (".lora_B" in part or "score" in part):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    return model.eval()


def config_of(directory, **lora):
    config = defaults()
    config.model.init_from = str(directory)
    for key, value in {"rank": RANK, "alpha": ALPHA, **lora}.items():
        config.lora[key] = value

    return filled(config)


def opened(config):
    """The model of a config and its parameters."""
    mesh = sharding.make_mesh(ONE, jax.devices()[:1])
    values = hf.read_config(hf.resolve(config.model.init_from), config.model.base)
    model = parameters.abstract_model(config, objectives.make(config.objective), mesh, values)
    return model, *parameters.init_params(config, model)


class Case:
    def __init__(self, family, tmp_path):
        self.place, self.torch_model = tmp_path, make_adapter(family, tmp_path)
        self.config = config_of(tmp_path / "adapter")
        self.model, self.params, self.head = opened(self.config)
        trained, self.frozen = parameters.split(self.config, self.params)
        self.trained = trained
        graphdef, frozen = self.model.graph, self.frozen
        loss = lambda trained: our_pass(parameters.join(trained, frozen), graphdef)
        self.step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick.OPTIONS)
        (self.loss, (self.scores, _)), grads = self.step(trained)
        self.grads = flat(grads)
        _, self.torch_scores, self.torch_loss = torch_pass(Inner(self.torch_model))
        self.torch_loss.backward()

    def by_path(self, find):
        """Our paths with what `find` says of PEFT's parameters, as arrays of our layout."""
        found = {}
        for row in hf.expected_rows(self.model.plain.shapes, self.model.config):
            if row.name == "score.weight":
                found[row.path] = find("base_model.model.score.modules_to_save.default.weight").T
            if not row.path.endswith("/kernel") or row.name == "score.weight":
                continue
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                names = [n.removesuffix(".weight") for n in row.names(self.model.config.layers)]
                arrays = [find(f"base_model.model.{name}.{theirs}.default.weight").T for name in names]
                path = row.path.replace("kernel", ours)
                found[path] = np.stack(arrays) if row.stacked else arrays[0]
        return found


class Inner:
    """PEFT's model in the form of the wrapped one, for `torch_pass`."""

    def __init__(self, model):
        self.model, self.whole = model.base_model.model.model, model

    def __call__(self, tokens):
        return self.whole(tokens)


NAMES = [
    *("qwen3", "gemma2"),
    pytest.param("olmo3", marks=pytest.mark.slow),
    pytest.param("llama3", marks=pytest.mark.release),
]


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("lora"))


def test_scores_and_loss_of_an_adapter_are_those_of_peft(case):
    assert case.head == "kept"
    np.testing.assert_allclose(case.scores, case.torch_scores.detach(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(case.loss, case.torch_loss.detach(), atol=1e-5, rtol=0)


def test_gradients_of_adapters_and_head_are_those_of_peft(case):
    named = dict(case.torch_model.named_parameters())
    expected = case.by_path(lambda name: named[name].grad.numpy())
    assert expected.keys() == case.grads.keys()
    assert sum(p.numel() for p in named.values() if p.requires_grad) == sum(x.size for x in case.grads.values())
    for path, reference in expected.items():
        largest = np.abs(reference).max()
        assert largest > 0, path
        np.testing.assert_allclose(case.grads[path], reference, atol=1e-3 * largest, rtol=0, err_msg=path)


def test_ten_adamw_steps_are_those_of_peft(case):
    import copy

    import torch

    model = copy.deepcopy(case.torch_model)
    trains = [p for p in model.parameters() if p.requires_grad]
    theirs = torch.optim.AdamW(
        trains, 1e-3, betas=(ADAM["b1"], ADAM["b2"]), eps=ADAM["eps"], weight_decay=ADAM["weight_decay"]
    )
    for _ in range(STEPS):
        theirs.zero_grad()
        torch_pass(Inner(model))[2].backward()
        theirs.step()
    ours, params = optax.adamw(1e-3, **ADAM), case.trained
    state = ours.init(params)

    @functools.partial(jax.jit, compiler_options=quick.OPTIONS)
    def update(params, state, grads):
        updates, state = ours.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = update(params, state, case.step(params)[1])
    named = dict(model.named_parameters())
    for path, reference in case.by_path(lambda name: named[name].detach().numpy()).items():
        np.testing.assert_allclose(flat(params)[path], reference, atol=1e-3, rtol=0, err_msg=path)


def test_merged_is_unmerged(case):
    merged = case.model.merged(case.params, "float32")
    assert jax.tree.structure(merged) == jax.tree.structure(case.model.plain.shapes)
    _, (scores, _) = jax.jit(functools.partial(our_pass, graphdef=case.model.plain.graph))(merged)
    # Of the largest score: float32 sums round by their largest terms, and a busy machine adds in another order.
    np.testing.assert_allclose(scores, case.scores, atol=1e-5 * np.abs(case.scores).max(), rtol=0)
    loaded, _ = hf.load(case.place / "adapter", case.model.plain.shapes, case.model.config, seed=0)
    for path, x in flat(merged).items():
        np.testing.assert_allclose(flat(loaded)[path], x, atol=1e-6, err_msg=path)


def scores_in_peft(base, adapter):
    import transformers
    from peft import PeftModel

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, attn_implementation="eager"
    )
    return torch_pass(Inner(PeftModel.from_pretrained(model, adapter).eval()))[1].detach()


def save(case, directory):
    options = {"base": str(case.place / "base"), "root_scale": False, "architecture": "SequenceClassification"}
    params, adapters = case.params, case.model.adapters
    hf.save_adapter(directory, params, case.model.config, adapters, also=lambda partial: None, **options)


def test_what_is_written_loads_in_peft_with_equal_scores(case, tmp_path):
    save(case, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / peft.CONFIG).read_text())
    assert written["task_type"] == "SEQ_CLS" and written["modules_to_save"] == ["score"]
    assert sorted(written["target_modules"]) == sorted(LINEAR) and written["rank_pattern"] == {}
    np.testing.assert_allclose(scores_in_peft(case.place / "base", tmp_path / "ours"), case.scores, atol=1e-4)
    again = opened(config_of(tmp_path / "ours"))[1]
    for path, x in flat(parameters.split(case.config, again)[0]).items():
        np.testing.assert_array_equal(x, flat(case.trained)[path], err_msg=path)


def test_fused_layers_are_merged_and_written(tmp_path):
    """PEFT has one adapter where rmjax has three: read, A is shared; written, they stand side by side in one."""
    torch_model = make_adapter("phi3", tmp_path)
    expected = torch_pass(Inner(torch_model))[1].detach()
    config = config_of(tmp_path / "adapter")
    model, params, _ = opened(config)
    score = jax.jit(functools.partial(our_pass, graphdef=model.graph), compiler_options=quick.OPTIONS)
    np.testing.assert_allclose(score(params)[1][0], expected, atol=1e-4)
    moved = jax.tree_util.tree_map_with_path(  # A of q, k and v apart, as training leaves them
        lambda path, x: x * (1.5 if "/k/lora_a" in hf.path_name(path) else 1.0), params
    )
    case = Case.__new__(Case)
    case.place, case.params, case.model = tmp_path, moved, model
    save(case, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / peft.CONFIG).read_text())
    assert written["rank_pattern"] == {"qkv_proj": 3 * RANK, "gate_up_proj": 2 * RANK}
    np.testing.assert_allclose(scores_in_peft(tmp_path / "base", tmp_path / "ours"), score(moved)[1][0], atol=1e-4)


@pytest.mark.parametrize("targets", [r".*/(q|v)/kernel", r".*/(k|up)/kernel"])
def test_a_part_of_a_fused_layer_is_written_as_the_whole(tmp_path, targets):
    make_hf_model("phi3", tmp_path / "base", head=False, **CASES["phi3"][1])
    config = config_of(tmp_path / "base", targets=(targets,))
    model, params, _ = opened(config)
    draw = lambda path, x: (
        x if "lora_b" not in hf.path_name(path) else 0.2 * jax.random.normal(jax.random.key(1), x.shape)
    )
    params = jax.tree_util.tree_map_with_path(draw, params)
    case = Case.__new__(Case)
    case.place, case.params, case.model = tmp_path, params, model
    save(case, tmp_path / "ours")
    score = jax.jit(functools.partial(our_pass, graphdef=model.graph), compiler_options=quick.OPTIONS)
    np.testing.assert_allclose(scores_in_peft(tmp_path / "base", tmp_path / "ours"), score(params)[1][0], atol=1e-4)
    loaded, _ = hf.load(tmp_path / "ours", model.plain.shapes, model.config, seed=0)
    merged = flat(model.merged(params, "float32"))
    for path, x in flat(loaded).items():
        np.testing.assert_allclose(x, merged[path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize("root_scale", [False, True])
def test_a_new_adapter_begins_with_the_base(tmp_path, root_scale):
    make_hf_model("qwen3", tmp_path / "base")
    config = config_of(tmp_path / "base", root_scale=root_scale, targets=(r"decoder/.*/(q|v)/kernel",))
    model, params, _ = opened(config)
    plain = model.merged(params, "float32")
    loaded, _ = hf.load(tmp_path / "base", model.plain.shapes, model.config, seed=0)
    jax.tree.map(np.testing.assert_array_equal, plain, loaded)
    assert model.adapters.scale == ALPHA / (2 if root_scale else 4)
    adapted = {path for path in flat(params) if path.endswith("lora_a")}
    assert adapted == {f"decoder/{where}/{name}/lora_a" for where in ("layers", "last") for name in "qv"}
    bound = 1 / np.sqrt(48)
    drawn = np.asarray(flat(params)["decoder/layers/q/lora_a"])
    assert np.abs(drawn).max() <= bound and drawn.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert not np.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_base_is_what_it_is_read_as(tmp_path, kind):
    make_hf_model("qwen3", tmp_path / "base")
    model, params, _ = opened(config_of(tmp_path / "base", base=kind))
    bits = {name.rpartition("/")[2] for name in flat(params) if "/kernel/" in name}
    assert bits == {kind, f"{kind}_absmax"}
    run = lambda model, params: jax.jit(functools.partial(our_pass, graphdef=model.graph))(params)[1][0]
    np.testing.assert_allclose(run(model, params), run(model.plain, model.merged(params, "float32")), atol=1e-5, rtol=0)
    loaded, _ = hf.load(tmp_path / "base", model.plain.shapes, model.config, seed=0)
    difference = np.abs(run(model.plain, loaded) - run(model, params)).max()
    assert 0 < difference < {"int8": 0.2, "nf4": 3.0}[kind]


def bad(tmp_path, change):
    """A small adapter directory after `change` of its values and its files' names."""
    make_adapter("qwen3", tmp_path)
    path = tmp_path / "adapter" / peft.CONFIG
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type 'IA3'; only LORA"),
        ({"use_dora": True}, r"use_dora=True, which is not read"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa', which changes the base"),
        ({"r": 0}, r"r is 0, expected a rank of at least 1"),
        ({"lora_alpha": None}, r"lora_alpha or alpha_pattern has None, expected a number"),
        ({"alpha_pattern": {"(q_proj": 4}}, r"alpha_pattern has '\(q_proj', which is no regex"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\], which is not read"),
        ({"base_model_name_or_path": "/nowhere"}, r"adapter of '/nowhere', which cannot be had.*config.model.base"),
    ],
    ids=["kind", "dora", "pissa", "rank", "alpha", "pattern", "alora", "base"],
)
def test_adapters_that_are_not_read(tmp_path, change, message):
    directory = bad(tmp_path, lambda values: values.update(change))
    with pytest.raises(ValueError, match=message):
        opened(config_of(directory))


def test_an_adapter_of_another_base_and_other_terms(tmp_path):
    make_adapter("qwen3", tmp_path)
    make_hf_model("qwen3", tmp_path / "wider", head=False, intermediate_size=96)
    config = config_of(tmp_path / "adapter")
    config.model.base = str(tmp_path / "wider")
    with pytest.raises(ValueError, match=r"does not fit its base: .*gate_proj.*\[96, 48\].*config.model.base"):
        opened(config)
    with pytest.raises(ValueError, match=r"rank 4 and alpha 12.*config.lora asks for another.*config.lora.rank=4"):
        opened(config_of(tmp_path / "adapter", rank=8))
    with pytest.raises(ValueError, match=r"config.model.base=.* is for adapters"):
        hf.read_config(tmp_path / "base", base=str(tmp_path / "wider"))
    with pytest.raises(ValueError, match=r"'decoder/.*/queries' matches no kernel.*decoder/layers/q/kernel"):
        opened(config_of(tmp_path / "base", targets=("decoder/.*/queries",)))


def test_an_adapter_without_its_head(tmp_path):
    make_adapter("qwen3", tmp_path, head=False)
    with_head = tmp_path / "adapter" / peft.WEIGHTS
    from safetensors.numpy import load_file, save_file

    save_file({name: x for name, x in load_file(with_head).items() if "score" not in name}, with_head)
    with pytest.raises(ValueError, match=r"SEQ_CLS adapter without a head.*modules_to_save"):
        opened(config_of(tmp_path / "adapter"))

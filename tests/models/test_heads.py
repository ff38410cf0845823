"""Language models and classifiers against transformers: outputs, gradients, and what their exports say there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import transformers
from safetensors.numpy import load_file, save_file
from tiny_models import PAD, SIZES, make_hf_model, random_groups, tree_rows

from rmjax.models import heads, hf
from rmjax.models.config import from_hf
from rmjax.sharding import RULES, first_match, path_name

TEXTS = [[text] for pair in random_groups(seed=3, groups=3) for text in pair]  # each a tree of its own
ROWS = [TEXTS[:4], TEXTS[4:]]  # the second ends in padding
BATCH = tree_rows(ROWS, row_tokens=128)
TINY = {name: value for name, value in SIZES.items() if not name.endswith("token_id")}


def trained_batch():
    """The batch with random weights on about half of the tokens that have a target."""
    rng = np.random.default_rng(0)
    batch = {**BATCH, "loss_weight": np.zeros(BATCH["tokens"].shape, np.float32)}
    for r, row in enumerate(ROWS):
        start = 0
        for (text,) in row:
            n = len(text) - 1
            batch["loss_weight"][r, start : start + n] = (rng.random(n) < 0.5) * rng.uniform(0.5, 2, n)
            start += len(text)
    return batch


def in_transformers(model, batch):
    """[B, T] losses of the trained tokens, where their targets are likeliest, and the weighted sum of the losses."""
    import torch

    nll, correct = (np.zeros(batch["tokens"].shape, np.float32) for _ in range(2))
    total = 0.0
    for r, row in enumerate(ROWS):
        start = 0
        for (text,) in row:
            logits, targets = model(torch.tensor([text])).logits[0, :-1], torch.tensor(text[1:])
            weight = batch["loss_weight"][r, start : start + len(targets)]
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            total = total + (losses * torch.tensor(weight)).sum()
            nll[r, start : start + len(targets)] = losses.detach().numpy() * (weight != 0)
            correct[r, start : start + len(targets)] = (logits.argmax(-1) == targets).numpy() * (weight != 0)
            start += len(text)
    return nll, correct, total


def open_model(directory, architecture, outputs=0):
    config = from_hf(hf.read_config(directory))
    graphdef, shapes = heads.abstract(config, outputs, architecture=architecture)
    return config, graphdef, hf.load(directory, shapes, config, seed=0)[0]


def auto(architecture, directory):
    """The export in transformers, which has exactly the names that it wants."""
    import torch

    kind = getattr(transformers, f"AutoModelFor{architecture}")
    model, report = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


MODELS = [("qwen2", True), ("mistral", False), ("gemma2", True), ("granite", False)]
SLOW_MODELS = [("qwen3", False), ("llama", True), ("gemma3_text", True)]
MODELS += [pytest.param(*model, marks=pytest.mark.slow) for model in SLOW_MODELS]


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_language_model_is_that_of_transformers(family, tied, tmp_path):
    import torch

    reference = make_hf_model(family, tmp_path / "base", head=False, tie_word_embeddings=tied)
    config, graphdef, params = open_model(tmp_path / "base", "CausalLM")
    batch = trained_batch()

    def loss(params):
        out = heads.merge(graphdef, params)(batch)
        return (out["nll"] * batch["loss_weight"]).sum(), out

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick.OPTIONS)
    (total, out), grads = step(params)
    nll, correct, expected = in_transformers(reference, batch)
    expected.backward()
    np.testing.assert_allclose(out["nll"], nll, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(out["correct"], correct)
    np.testing.assert_allclose(total, expected.detach(), rtol=1e-5)
    grads = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    assert ("lm_head/embedding" in grads) != tied
    named = dict(reference.named_parameters())
    for row in hf.expected_rows(params, config):
        slopes = [named.pop(name).grad.numpy() for name in row.names(config.layers)]
        slope = np.stack(slopes) if row.stacked else slopes[0]
        slope = np.swapaxes(slope, -1, -2) if row.transposed else slope
        largest = np.abs(slope).max()
        assert largest > 0
        np.testing.assert_allclose(grads[row.path], slope, atol=1e-3 * largest, rtol=0, err_msg=row.path)
    assert not named

    moved = jax.tree.map(lambda leaf: leaf * 1.02, params)  # not what is in the base's files
    values = {**hf.read_config(tmp_path / "base"), "num_labels": 2, "id2label": {"0": "a", "1": "b"}}
    hf.save(
        tmp_path / "export",
        moved,
        values,
        config,
        dtype="float32",
        pad_token_id=PAD,
        architecture="CausalLM",
        labels=(),
    )
    written = hf.read_config(tmp_path / "export")
    assert written["architectures"] == [type(reference).__name__] and written["tie_word_embeddings"] is tied
    assert not {"num_labels", "id2label", "label2id", "problem_type"} & written.keys()
    assert ("lm_head.weight" in load_file(tmp_path / "export" / hf.WEIGHTS)) != tied
    model = auto("CausalLM", tmp_path / "export")
    with torch.no_grad():
        np.testing.assert_allclose(step(moved)[0][1]["nll"], in_transformers(model, batch)[0], atol=1e-4, rtol=0)
    jax.tree.map(np.testing.assert_array_equal, open_model(tmp_path / "export", "CausalLM")[2], moved)


CLASSIFIERS = [
    ("qwen2", "TokenClassification", 2),
    ("qwen3", "SequenceClassification", 3),
    pytest.param("mistral", "TokenClassification", 1, marks=pytest.mark.slow),
    *(pytest.param(f, "TokenClassification", 2, marks=pytest.mark.slow) for f in ("qwen3", "llama")),
    *(pytest.param(f, "SequenceClassification", 3, marks=pytest.mark.slow) for f in ("qwen2", "llama", "mistral")),
    *(
        pytest.param(f, "SequenceClassification", 5, marks=pytest.mark.slow)
        for f in ("qwen2", "qwen3", "llama", "phi3")
    ),
]


@pytest.mark.parametrize(("family", "architecture", "outputs"), CLASSIFIERS)
def test_classifiers_score_the_same_in_transformers(family, architecture, outputs, tmp_path):
    import torch

    make_hf_model(family, tmp_path / "base", head=False)
    config, graphdef, params = open_model(tmp_path / "base", architecture, outputs)
    labels = [f"name {i}" for i in range(outputs)]
    problem_type = "single_label_classification" if outputs > 1 else "regression"
    kind = {"architecture": architecture, "labels": labels, "problem_type": problem_type}
    values = {**hf.read_config(tmp_path / "base"), "token_classification_bias": False}
    hf.save(tmp_path / "export", params, values, config, dtype="float32", pad_token_id=PAD, **kind)
    batch = dict(BATCH)
    if architecture == "TokenClassification":  # two scored tokens of each text, as steps have them
        first = batch["end"] - np.array([5, 3, 4, 2])
        batch["end"] = np.stack([np.where(batch["end"] < 0, -1, first), batch["end"]], -1).reshape(2, -1)
    run = jax.jit(lambda params: heads.merge(graphdef, params)(batch), compiler_options=quick.OPTIONS)
    ours = np.asarray(run(params))[batch["end"] >= 0]
    model = auto(architecture, tmp_path / "export")
    assert model.config.id2label == dict(enumerate(labels)) and model.config.label2id["name 0"] == 0
    assert model.config.problem_type == problem_type and model.config.num_labels == outputs
    theirs = []
    with torch.no_grad():
        for e, (text,) in enumerate(TEXTS):
            logits = model(torch.tensor([text])).logits[0].numpy()
            if architecture == "TokenClassification":
                theirs.append(logits[len(text) - 1 - [5, 3, 4, 2][e % 4]])
                logits = logits[-1]
            theirs.append(logits)
    assert ours.shape == (len(theirs), outputs)
    np.testing.assert_allclose(ours, np.stack(theirs), atol=1e-4, rtol=0)
    again = open_model(tmp_path / "export", architecture, outputs)[2]
    jax.tree.map(np.testing.assert_array_equal, again, params)


def spoil(directory, change):
    """Rewrites the weights of a directory by a function that changes a dict of arrays in place."""
    tensors = load_file(directory / hf.WEIGHTS)
    change(tensors)
    save_file(tensors, directory / hf.WEIGHTS)


def test_a_bias_of_the_score_head_that_is_not_zero_is_refused(tmp_path):
    config = transformers.AutoConfig.for_model("qwen2", **SIZES, num_labels=2)
    model = transformers.AutoModelForTokenClassification.from_config(config)
    model.save_pretrained(tmp_path)
    assert "score.bias" in load_file(tmp_path / hf.WEIGHTS)
    ours, _, params = open_model(tmp_path, "TokenClassification", 2)
    np.testing.assert_array_equal(params["score"]["kernel"].T, model.score.weight.detach())
    spoil(tmp_path, lambda tensors: tensors.update({"score.bias": np.array([0, -0.25], np.float32)}))
    with pytest.raises(ValueError, match=r"has a score\.bias of up to 0\.25.*To train a new head, remove"):
        open_model(tmp_path, "TokenClassification", 2)
    _, shapes = heads.abstract(ours, 3)
    assert hf.check(tmp_path, shapes, ours) == "new"  # that head goes with its bias


def test_a_language_model_needs_its_output_embedding(tmp_path):
    make_hf_model("llama", tmp_path, head=True, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"1 missing:\n\s+lm_head\.weight \[97, 48\]"):
        open_model(tmp_path, "CausalLM")
    make_hf_model("llama", tmp_path, head=True, tie_word_embeddings=True)
    _, _, params = open_model(tmp_path, "CausalLM")  # the embedding serves, the score head does not
    assert set(params) == {"decoder"}


def test_a_tied_checkpoint_may_repeat_its_embedding(tmp_path):
    make_hf_model("qwen2", tmp_path, head=False, tie_word_embeddings=True)
    spoil(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}))
    assert set(open_model(tmp_path, "CausalLM")[2]) == {"decoder"}


def test_labels_must_be_the_heads(tmp_path):
    config = from_hf({**TINY, "model_type": "qwen2"})
    params = jax.jit(lambda: heads.init(config, 2), compiler_options=quick.OPTIONS)()
    for labels in (("a",), ("a", "a"), ("a", "b", "c")):
        with pytest.raises(ValueError, match="must be 2 different names"):
            hf.save(tmp_path / "x", params, {}, config, dtype="float32", pad_token_id=PAD, labels=labels)
    assert not list(tmp_path.iterdir())


def test_unknown_architecture():
    with pytest.raises(
        ValueError, match="'ForScores' is none of SequenceClassification, TokenClassification, CausalLM"
    ):
        heads.abstract(from_hf({**TINY, "model_type": "qwen2"}), 1, architecture="ForScores")


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_a_language_model(tied):
    config = from_hf({**TINY, "model_type": "qwen2", "tie_word_embeddings": tied})
    graphdef, shapes = heads.abstract(config, 0, jnp.bfloat16, jnp.bfloat16, architecture="CausalLM")
    params = jax.jit(lambda: heads.init(config, 0, jnp.bfloat16, seed=1, architecture="CausalLM"))()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    names = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert ("lm_head/embedding" in names) != tied
    assert all(first_match(RULES, name, "sharding") is not None for name in names)
    out = jax.eval_shape(heads.merge(graphdef, params), {**BATCH, "loss_weight": jnp.ones(BATCH["tokens"].shape)})
    expected = (BATCH["tokens"].shape, jnp.float32)
    assert {name: (x.shape, x.dtype) for name, x in out.items()} == {"nll": expected, "correct": expected}

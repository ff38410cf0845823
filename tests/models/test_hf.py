"""Checkpoints in and out: we read what transformers saved, it reads what we save, and the rest is refused."""

import json
import re
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import transformers
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from tiny_models import FAMILIES as FAMILY_VALUES
from tiny_models import PAD, SIZES, make_hf_model, random_groups, tree_rows

from rmjax.models import heads, hf, hf_export, weight_files
from rmjax.models.config import from_hf
from rmjax.models.families import FAMILIES
from rmjax.runtime import notes
from rmjax.sharding import make_mesh, param_shardings

PAIRS = random_groups(seed=2, groups=2)
BATCH = tree_rows([PAIRS], row_tokens=128)
CONVERSATIONS = [conversation for pair in PAIRS for conversation in pair]


def open_checkpoint(directory, **options):
    """Config, graphdef, parameters and what became of the head."""
    config = from_hf(hf.read_config(directory))
    graphdef, shapes = heads.abstract(config, outputs=1)
    return (config, graphdef, *hf.load(directory, shapes, config, seed=0, **options))


def our_scores(graphdef, params):
    run = jax.jit(lambda params: heads.merge(graphdef, params)(BATCH), compiler_options=quick.OPTIONS)
    return np.asarray(run(params))[0, :, 0]


def scores_in_transformers(model):
    """All conversations as one batch, padded on the right."""
    import torch

    longest = max(map(len, CONVERSATIONS))
    tokens = torch.tensor([c + [PAD] * (longest - len(c)) for c in CONVERSATIONS])
    with torch.no_grad():
        return model(tokens, attention_mask=(tokens != PAD).long()).logits[:, 0].numpy()


def export(directory, source, params, config, dtype="float32", **options):
    import torch

    hf.save(directory, params, hf.read_config(source), config, dtype=dtype, pad_token_id=PAD, **options)
    kind = transformers.AutoModelForSequenceClassification
    model, report = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def edit(directory, change):
    """Rewrites the weights of a directory by a function that changes a dict of arrays in place."""
    tensors = load_file(directory / hf.WEIGHTS)
    change(tensors)
    save_file(tensors, directory / hf.WEIGHTS)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 300.0,
}
EXPORTED = {
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {},
    "llama": {"rope_parameters": LLAMA3, "mlp_bias": True},
    "mistral": {},
    "gemma2": {},
    "gemma3_text": {},
    "olmo2": {},
    "olmo3": {},
    "phi3": {},
    "smollm3": {},
}


@pytest.mark.parametrize("family", EXPORTED)
def test_export_scores_the_same_in_transformers(family, tmp_path):
    original = make_hf_model(family, tmp_path / "base", **EXPORTED[family])
    config, graphdef, params, _ = open_checkpoint(tmp_path / "base")
    params = jax.tree.map(lambda leaf: leaf * 1.01, params)  # not what is in the base's files
    model = export(tmp_path / "export", tmp_path / "base", params, config)
    scores = our_scores(graphdef, params)
    np.testing.assert_allclose(scores_in_transformers(model), scores, atol=1e-4, rtol=0)
    assert np.abs(scores - scores_in_transformers(original)).max() > 1e-3
    assert type(model).__name__ == type(original).__name__
    _, _, again, head = open_checkpoint(tmp_path / "export", require_head=True)
    assert head == "kept"
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("names", ["v4", "v5"])
def test_the_text_model_of_a_multimodal_one_is_loaded_and_said(names, tmp_path, caplog):
    import torch

    text = {**SIZES, **FAMILY_VALUES["gemma3_text"], "model_type": "gemma3_text"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    before = hf.read_config(tmp_path)
    assert before["model_type"] == "gemma3_text" and before["sliding_window"] == 5
    renames = {"model.language_model.": "language_model.model.", "model.vision": "vision", "model.multi": "multi"}
    if names == "v4":  # as on the hub

        def older(tensors):
            for name in list(tensors):
                for new, old in renames.items():
                    if name.startswith(new):
                        tensors[old + name.removeprefix(new)] = tensors.pop(name)

        edit(tmp_path, older)
    ours, graphdef, params, head = open_checkpoint(tmp_path)
    assert head == "new" and re.search(r"is multimodal: its text model is loaded, \d+ tensors", caplog.text)
    decoder = heads.merge(graphdef, params).decoder
    one = tree_rows([[[CONVERSATIONS[0]]]], len(CONVERSATIONS[0]))
    hidden = decoder.norm(decoder(*(one[name] for name in ("tokens", "positions", "visible_from", "visible_until"))))
    with torch.no_grad():
        expected = theirs.model.language_model(torch.tensor([CONVERSATIONS[0]])).last_hidden_state[0]
    np.testing.assert_allclose(hidden[0], expected, atol=1e-4, rtol=0)
    # What is written is a text model of its own.
    export(tmp_path / "export", tmp_path, params, ours)


@pytest.mark.parametrize("form", ["v4", "v5"])
def test_config_is_read_by_both_versions_of_transformers(form, tmp_path):
    import torch

    make_hf_model("llama", tmp_path, rope_parameters=LLAMA3)
    source = hf.read_config(tmp_path)
    if form == "v4":
        rope = source.pop("rope_parameters")
        source |= {
            "rope_theta": rope.pop("rope_theta"),
            "rope_scaling": {"type": rope.pop("rope_type"), **rope},
        }
    source["a_key_of_its_own"] = 7
    ours = from_hf(source)
    kind = {"architecture": "SequenceClassification", "labels": ["reward"], "problem_type": "regression"}
    written = hf.config_json(source, ours, **kind, dtype=jnp.bfloat16, pad_token_id=3)
    older = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    newer = {key: value for key, value in written.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    for config in (written, older, newer):
        assert from_hf(config) == ours
        read = transformers.LlamaConfig.from_dict(config)
        assert read.rope_parameters == LLAMA3
        assert (read.num_labels, read.pad_token_id, read.problem_type) == (1, 3, "regression")
        assert read.dtype == torch.bfloat16 and read.architectures == ["LlamaForSequenceClassification"]
    assert older["rope_scaling"]["rope_type"] == "llama3" and older["rope_theta"] == 300.0
    assert written["a_key_of_its_own"] == 7


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_round_trip_is_exact(dtype, tmp_path):
    reference = make_hf_model("qwen2", tmp_path / "base", dtype=dtype)
    config, graphdef, params, _ = open_checkpoint(tmp_path / "base")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(our_scores(graphdef, params), scores_in_transformers(reference), atol=1e-4, rtol=0)
    export(tmp_path / "export", tmp_path / "base", params, config, dtype=dtype)
    before, after = (load_file(tmp_path / name / hf.WEIGHTS) for name in ("base", "export"))
    assert after.pop("score.weight").dtype == np.float32  # a rounded head gains nothing
    before.pop("score.weight")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)


def test_several_files_with_an_index(tmp_path):
    reference = make_hf_model("mistral", tmp_path / "base")
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    config, _, params, _ = open_checkpoint(tmp_path / "sharded")
    jax.tree.map(np.testing.assert_array_equal, params, open_checkpoint(tmp_path / "base")[2])
    model = export(tmp_path / "export", tmp_path / "base", params, config, max_shard_bytes=40e3)
    np.testing.assert_allclose(scores_in_transformers(model), scores_in_transformers(reference), atol=1e-5, rtol=0)
    files = sorted((tmp_path / "export").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "export" / hf.INDEX).read_text())
    tensors = {file.name: load_file(file) for file in files}
    assert len(files) > 3 and all(sum(t.nbytes for t in of.values()) <= 40e3 for of in tensors.values())
    assert index["weight_map"] == {name: file for file, of in tensors.items() for name in of}
    assert index["metadata"]["total_size"] == sum(t.nbytes for of in tensors.values() for t in of.values())
    files[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {files[1].name}, which its {hf.INDEX} names"):
        open_checkpoint(tmp_path / "export")


@pytest.mark.parametrize("tied", [True, False])
def test_language_model_gets_a_new_head(tied, tmp_path):
    make_hf_model("qwen2", tmp_path, head=False, tie_word_embeddings=tied, initializer_range=0.5)
    assert ("lm_head.weight" in load_file(tmp_path / hf.WEIGHTS)) != tied
    config, _, params, head = open_checkpoint(tmp_path)
    assert head == "new" and params["score"]["kernel"].shape == (48, 1)
    assert 0.3 < params["score"]["kernel"].std() < 0.7
    _, shapes = heads.abstract(config, 1)
    other, _ = hf.load(tmp_path, shapes, config, seed=1)
    assert np.abs(other["score"]["kernel"] - params["score"]["kernel"]).max() > 0.1
    np.testing.assert_array_equal(other["decoder"]["layers"]["q"]["bias"], params["decoder"]["layers"]["q"]["bias"])
    with pytest.raises(ValueError, match=r"no score head: no score\.weight"):
        open_checkpoint(tmp_path, require_head=True)


@pytest.fixture
def told(monkeypatch):
    """The lines that were logged."""
    lines: list[str] = []
    monkeypatch.setattr(notes, "tell", lines.append)
    return lines


def test_head_of_another_number_of_labels_is_replaced(tmp_path, told):
    make_hf_model("llama", tmp_path)
    head = {"score.weight": np.ones((5, 48), np.float32), "score.bias": np.ones(5, np.float32)}
    edit(tmp_path, lambda tensors: tensors.update(head))
    assert open_checkpoint(tmp_path)[3] == "new"
    assert "a head of another kind, score.weight of 5 labels and score.bias, which is not used: 1 label" in told[0]
    with pytest.raises(ValueError, match="5 labels"):
        open_checkpoint(tmp_path, require_head=True)


def test_an_index_beside_a_whole_file_is_stale(tmp_path, told):
    """As in a folder into which a model was saved twice, once in shards."""
    reference = make_hf_model("llama", tmp_path)
    names = load_file(tmp_path / hf.WEIGHTS)
    save_file({name: np.zeros_like(x) for name, x in names.items()}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (tmp_path / hf.INDEX).write_text(json.dumps(index))
    head = open_checkpoint(tmp_path, require_head=True)[2]["score"]["kernel"]
    again = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path))
    np.testing.assert_array_equal(np.asarray(head).T, again.score.weight.detach().numpy())
    np.testing.assert_array_equal(np.asarray(head).T, reference.score.weight.detach().numpy())
    assert told == [
        f"{tmp_path}: model.safetensors is read, not: model.safetensors.index.json (it names other files; "
        "transformers, too, takes the single one), model-00001-of-00001.safetensors"
    ]
    (tmp_path / hf.INDEX).write_text("{")
    assert open_checkpoint(tmp_path)[3] == "kept"


def test_weights_that_are_not_read_are_named(tmp_path, told):
    make_hf_model("llama", tmp_path, head=False)
    value_head = {"v_head.summary.weight": np.ones((1, 48), np.float32), "v_head.summary.bias": np.ones(1, np.float32)}
    save_file(value_head, tmp_path / "value_head.safetensors")
    assert open_checkpoint(tmp_path)[3] == "new"
    assert "model.safetensors is read, not: value_head.safetensors (a value head of TRL or LLaMA-Factory" in told[0]
    edit(tmp_path, lambda tensors: tensors.update(value_head))
    with pytest.raises(
        ValueError, match=r"2 unknown:(.|\n)*a head of another kind, which is not read: if it is one row"
    ):
        open_checkpoint(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.0.lora_A.weight": np.ones((1, 48), np.float32)}))
    with pytest.raises(ValueError, match="They hold a PEFT adapter in a file of its base"):
        open_checkpoint(tmp_path)


def test_a_file_is_no_model_directory(tmp_path):
    for name, advice in (("m.gguf", "quantized for llama"), ("m.bin", "pickled"), ("m.safetensors", "safetensors")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=f"is a file, expected a Hugging Face directory: .*{advice}"):
            hf.resolve(tmp_path / name)


def test_bare_decoder_and_rotary_buffers(tmp_path):
    reference = make_hf_model("llama", tmp_path / "base")
    reference.model.save_pretrained(tmp_path / "bare")
    edit(
        tmp_path / "bare",
        lambda t: t.update({"layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}),
    )
    _, _, params, head = open_checkpoint(tmp_path / "bare")
    assert head == "new"
    jax.tree.map(np.testing.assert_array_equal, params["decoder"], open_checkpoint(tmp_path / "base")[2]["decoder"])


def test_shards_on_a_mesh_and_other_dtype(tmp_path):
    make_hf_model("qwen3", tmp_path)
    config = from_hf(hf.read_config(tmp_path))
    _, shapes = heads.abstract(config, 1, param_dtype=jnp.bfloat16)
    shardings = param_shardings(make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]), shapes)
    wanted = jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, shardings)
    params, _ = hf.load(tmp_path, wanted, config, seed=0)
    plain = open_checkpoint(tmp_path)[2]

    def same(leaf, want, full):
        assert (leaf.dtype, leaf.sharding) == (want.dtype, want.sharding)
        np.testing.assert_array_equal(leaf, full.astype(leaf.dtype))

    jax.tree.map(same, params, wanted, plain)
    row = next(row for row in FAMILIES["qwen3"].table if row.path == "decoder/layers/q/kernel")
    sharding = NamedSharding(shardings["decoder"]["norm"]["scale"].mesh, P(None, "fsdp", "tensor"))
    assert hf.exchanged(sharding, 3, row).spec == P(None, "tensor", "fsdp")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parts_are_what_safetensors_reads(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "PIECE", 1000)  # several to a tensor
    make_hf_model("qwen2", tmp_path, dtype=dtype)
    tensors, whole = weight_files.open_tensors(tmp_path), load_file(tmp_path / hf.WEIGHTS)
    assert tensors.keys() == whole.keys()
    one, names = "model.embed_tokens.weight", [f"model.layers.{n}.mlp.up_proj.weight" for n in range(3)]
    for rows, columns in ((slice(None), slice(None)), (slice(24, 48), slice(None)), (slice(None), slice(12, 24))):
        part = weight_files.read([tensors[one]], (rows, columns), stacked=False)
        np.testing.assert_array_equal(part, whole[one][rows, columns])
        index = (slice(1, 3), rows, columns)
        stack = weight_files.read([tensors[name] for name in names], index, stacked=True)
        np.testing.assert_array_equal(stack, np.stack([whole[name] for name in names])[index])
        assert part.dtype == stack.dtype == jnp.dtype(dtype)  # nothing is widened on the host
        assert part.ctypes.data % weight_files.ALIGNED == stack.ctypes.data % weight_files.ALIGNED == 0


def test_layers_of_several_dtypes(tmp_path):
    make_hf_model("llama", tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name].astype(jnp.bfloat16)}))
    whole, params = load_file(tmp_path / hf.WEIGHTS), open_checkpoint(tmp_path)[2]
    stack = params["decoder"]["layers"]["down"]["kernel"]
    for n in range(2):
        np.testing.assert_array_equal(stack[n], whole[f"model.layers.{n}.mlp.down_proj.weight"].T.astype(np.float32))


def test_host_memory_of_loading_is_a_parameter_and_the_one_before(tmp_path):
    make_hf_model("qwen2", tmp_path, dtype="bfloat16", intermediate_size=30_000, num_hidden_layers=4)
    largest = 2 * 30_000 * 48 * np.array([3, 1])  # bytes in the file: gate of the stacked layers, and of the last one
    open_checkpoint(tmp_path)  # compiles
    tracemalloc.start()  # numpy reports what it allocates; the arrays that are loaded are JAX's
    open_checkpoint(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest.max() <= peak < 1.1 * largest.sum()


def test_all_mismatches_in_one_message(tmp_path):
    make_hf_model("qwen2", tmp_path)

    def spoil(tensors):
        tensors["model.extra.weight"] = np.ones(3, np.float32)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = np.ones(7, np.float32)
        tensors["model.embed_tokens.weight"] = np.ones((97, 48), np.int8)

    edit(tmp_path, spoil)
    with pytest.raises(ValueError) as error:
        open_checkpoint(tmp_path)
    for part in (
        r"do not fit its config (qwen2, 3 layers)",
        "1 unknown:\n    model.extra.weight [3]",
        "1 missing:\n    model.layers.1.mlp.up_proj.weight [80, 48]",
        "1 mis-shaped:\n    model.norm.weight [7], expected [48]",
        "model.embed_tokens.weight I8, expected one of F32, BF16, F16",
        "Check that config.json and the weights are of the same model",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(("weights", "config"), [("qwen3", "llama"), ("qwen2", "mistral"), ("llama", "qwen2")])
def test_weights_of_another_family(weights, config, tmp_path):
    make_hf_model(weights, tmp_path)
    values = hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": config}))
    with pytest.raises(ValueError, match=f"The names look like {weights}.*: check model_type"):
        open_checkpoint(tmp_path)


def test_directories_without_weights(tmp_path):
    make_hf_model("llama", tmp_path)
    config = from_hf(hf.read_config(tmp_path))
    _, shapes = heads.abstract(config, 1)
    load = lambda: hf.load(tmp_path, shapes, config, seed=0)
    whole = (tmp_path / hf.WEIGHTS).read_bytes()
    (tmp_path / hf.WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*whole download"):
        load()
    (tmp_path / hf.WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        load()
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "adapter_config.json")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not valid JSON"):
        load()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        hf.read_config(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        hf.read_config(tmp_path)


def test_resolve(tmp_path, monkeypatch):
    assert hf.resolve(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="no such directory, and not a Hub id"):
        hf.resolve(tmp_path / "a" / "b")

    def offline(repository, **patterns):
        assert repository == "owner/name" and "*.safetensors" in patterns["allow_patterns"]
        raise hf.huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(hf.huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"owner/name: no such directory here, .*no connection"):
        hf.resolve("owner/name")


def test_interrupted_export_leaves_what_was_there(tmp_path):
    make_hf_model("llama", tmp_path / "base")
    config, _, params, _ = open_checkpoint(tmp_path / "base")
    target = tmp_path / "export"
    export(target, tmp_path / "base", params, config, also=lambda path: (path / "tokenizer.json").write_text("1"))
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert "tokenizer.json" in before

    def full_disk(path):
        assert (path / hf.WEIGHTS).is_file()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        export(target, tmp_path / "base", params, config, also=full_disk)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "export"]
    export(target, tmp_path / "base", params, config)  # replaces the old one, tokenizer and all
    assert not (target / "tokenizer.json").exists()
    shutil.rmtree(target)
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        export(target, tmp_path / "base", params, config)
    assert (target / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("piece", [1_000, 2**25])
def test_what_is_written_piece_by_piece_is_what_safetensors_writes(dtype, piece, tmp_path, monkeypatch):
    make_hf_model("qwen2", tmp_path / "base")
    monkeypatch.setattr(hf_export, "PIECE", piece)  # several to a tensor, or all at once
    config, _, params, _ = open_checkpoint(tmp_path / "base")
    values = hf.read_config(tmp_path / "base")
    hf.save(tmp_path / "ours", params, values, config, dtype=dtype, pad_token_id=PAD)
    whole = load_file(tmp_path / "base" / hf.WEIGHTS)
    kept = {name: x.astype("float32" if name == "score.weight" else jnp.dtype(dtype)) for name, x in whole.items()}
    save_file(kept, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours" / hf.WEIGHTS).read_bytes() == (tmp_path / "theirs").read_bytes()

"""RewardModel and exports against transformers: scores, pooling, contracts, and what is refused."""

import contextlib
import dataclasses
import io
import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import transformers
from safetensors.numpy import load_file
from small_tokenizers import CHATML

import rmjax
from rmjax.batches.chat import PROBE, Chat, load_tokenizer
from rmjax.batches.trees import build_tree, shared_trees
from rmjax.config import defaults
from rmjax.data import synthetic
from rmjax.export import write as export
from rmjax.inference import contract, engine, reward_model
from rmjax.inference.reward_model import RewardModel
from rmjax.models import hf
from rmjax.objectives.bradley_terry import BradleyTerry
from rmjax.train import training

ROOT = Path(__file__).parents[2]
FAMILIES = ["qwen2", "qwen3", "llama", "mistral"]
CLOCK = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|im_start|>system\nToday is ' + date_string + '<|im_end|>\n' }}" + CHATML
)
JULY = {"date_string": "26 Jul 2024"}


def chat_of(*turns):
    """A conversation of these turns, the user's first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


TREE = "What is a tree?"
CONVERSATIONS = [
    chat_of(TREE, "A plant."),  # the first three share their prompt
    chat_of(TREE, "A graph without cycles is a tree too."),
    chat_of(TREE, "\n\nA plant."),  # its newlines are one token with the header's
    chat_of("Be brief.", "0 1 2 3"),
    [{"role": "system", "content": "Be kind."}, *chat_of(TREE, "A plant.")],
    chat_of("first question", "first answer", "second question", "second answer"),
    chat_of("Say é 日本語 🙂", "e\u0301!"),
    chat_of("first question " * 90, "second answer " * 40),
    chat_of(TREE, "A plant."),  # again, and not beside the first
    chat_of(TREE, "A plant."),
]


def make_model(directory, family, tokenizer_dir, **values):
    """A tiny model of transformers with a tokenizer beside it, as somebody else would have saved it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    tiny_models.make_hf_model(family, directory, **{**sizes, **values})
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def foreign(tmp_path_factory, tokenizer_dir):
    """A directory of each family, none of them made by rmjax."""
    return {name: make_model(tmp_path_factory.mktemp(name), name, tokenizer_dir) for name in FAMILIES}


@pytest.fixture(scope="session")
def loaded(foreign):
    """RewardModel of each directory, loaded once."""
    return {name: RewardModel.load(directory) for name, directory in foreign.items()}


def hf_model(directory):
    return transformers.AutoModelForSequenceClassification.from_pretrained(str(directory), dtype="float32").eval()


def hf_scores(directory, conversations, *, batched, **template_kwargs):
    """Scores by transformers alone, as docs/scoring.md says."""
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory))
    model = hf_model(directory)
    assert model.config.num_labels == 1
    texts = [tokenizer.apply_chat_template(c, tokenize=False, **template_kwargs) for c in conversations]
    scores = []
    with torch.no_grad():
        for part in [texts] if batched else [[text] for text in texts]:
            batch = tokenizer(part, return_tensors="pt", padding=True, add_special_tokens=False)
            scores += model(**batch).logits[:, 0].tolist()
    return scores


# Scores of directories that others made


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_transformers(family, foreign, loaded):
    scores = loaded[family].score(CONVERSATIONS)
    assert loaded[family].contract is None and all(type(score) is float for score in scores)
    assert len(loaded[family].chat.encode([loaded[family].chat.render(CONVERSATIONS[7])])[0]) > engine.LEAST_ROW
    assert np.std(scores) > 0.1
    for batched in (True, False):
        np.testing.assert_allclose(scores, hf_scores(foreign[family], CONVERSATIONS, batched=batched), atol=1e-4)


@pytest.mark.parametrize("family", ["mistral"])  # the one with a window
def test_a_score_does_not_depend_on_its_neighbours(family, loaded):  # NUMERICS 3
    model = loaded[family]
    scores = np.array(model.score(CONVERSATIONS))
    order = np.random.default_rng(0).permutation(len(scores))
    np.testing.assert_allclose(model.score([CONVERSATIONS[i] for i in order]), scores[order], atol=1e-5)
    np.testing.assert_allclose(model.score(CONVERSATIONS[3:6]), scores[3:6], atol=1e-5)
    np.testing.assert_allclose([model.score([c])[0] for c in CONVERSATIONS[:3]], scores[:3], atol=1e-5)
    np.testing.assert_allclose(scores[[0, 0]], scores[[8, 9]], atol=1e-5)


def counted(model, *arguments):
    """The first outputs, and the tokens that were computed and those of all sequences, each whole."""
    before = dataclasses.replace(model.inference.work)
    outputs = model.outputs(*arguments)[:, 0]
    return outputs, model.inference.work.computed - before.computed, model.inference.work.unshared - before.unshared


def test_beginnings_are_shared_wherever_they_stand():
    first, second, other = (np.arange(start, start + 40, dtype=np.int32) for start in (10, 100, 200))
    answers = [np.concatenate([prompt, [300 + i]]).astype(np.int32) for i in range(3) for prompt in (first, second)]
    trees, index = shared_trees([*answers, other, answers[0]], room=64, most=64)
    assert sorted(map(len, trees)) == [40, 39 + 2 * 3, 39 + 2 * 3] and index[-1] == index[0]
    found = [sequence for tree in trees for sequence in tree.sequences()]
    for sequence, at in zip([*answers, other, answers[0]], index):
        np.testing.assert_array_equal(found[at], sequence)


def test_a_tree_beyond_its_room_takes_only_sequences_that_share_half():
    little = [np.concatenate([np.arange(20), [300 + i] * 60]).astype(np.int32) for i in range(4)]
    much = [np.concatenate([np.arange(60), [300 + i] * 20]).astype(np.int32) for i in range(4)]
    sizes = lambda sequences: [len(tree.end) for tree in shared_trees(sequences, room=150, most=1000)[0]]
    assert sizes(little) == [2, 2] and sizes(much) == [4]


def test_few_shapes_hold_all_trees_with_little_padding(monkeypatch):
    """A device computes one row, of one of a dozen lengths; several where rows are as long as they get."""
    assert [engine.row_tokens(n) for n in (1, 256, 257, 384, 385, 3000, 8192, 8193)] == [
        *[256, 256, 384, 384, 512, 3072, 8192, 12288]
    ]
    assert len(list(engine.call_shapes(engine.LEAST_ROW, engine.LONGEST_ROW))) == 11
    assert engine.call_shape(np.full(13, 150), 1) == (1, 2048) and engine.call_shape(np.array([150] * 8), 2) == (2, 768)
    monkeypatch.setattr(engine, "BATCH_TOKENS", {"cpu": 32_768})  # an accelerator's
    shapes = list(engine.call_shapes(engine.LEAST_ROW, engine.LONGEST_ROW))
    assert len(shapes) == 13 and shapes[-3:] == [(1, 8192), (2, 8192), (4, 8192)]
    assert engine.call_shape(np.full(8 * 54, 150), 1) == (4, 8192)  # 54 in a row
    assert engine.call_shape(np.array([9000]), 1) == (1, 12288)


@pytest.mark.parametrize(
    ("prompt", "response", "count"),
    [(100, 20, 8), (985, 58, 8), (400, 300, 24), (7, 3, 500)],  # 8 x 1,043 and 24 x 700 tokens are far above a row
)
def test_a_prompt_and_each_response_are_computed_once(loaded, prompt, response, count):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(5, 300, shape).astype(np.int32)
    shared, answers = draw(prompt), draw(count, response)
    answers[:, 0] = np.arange(count) % 290 + 5  # so that hardly any two begin alike
    answers[count // 2] = answers[0]
    sequences = [np.concatenate([shared, answer]) for answer in answers]
    outputs, computed, unshared = counted(loaded["qwen2"], sequences)
    assert unshared == count * (prompt + response)
    distinct = count - 1
    # The prompt's last token is repeated in each branch.
    most = prompt - 1 + distinct * (response + 1)
    assert computed == most if count < 290 else most - 2 * count < computed < most
    assert outputs[0] == outputs[count // 2]
    alone = [loaded["qwen2"].outputs([sequences[i]])[0, 0] for i in (0, 1, count - 1)]
    np.testing.assert_allclose(outputs[[0, 1, count - 1]], alone, atol=1e-5)


def test_a_tree_longer_than_a_row_repeats_its_prompt_in_each_part(loaded, monkeypatch):
    monkeypatch.setattr(reward_model, "LONGEST_ROW", 256)
    rng = np.random.default_rng(0)
    sequences = [np.concatenate([np.arange(5, 105), rng.integers(105, 300, 50)]).astype(np.int32) for _ in range(7)]
    outputs, computed, _ = counted(loaded["qwen2"], sequences)
    assert 3 * 100 + 7 * 50 <= computed <= 3 * 100 + 7 * 51  # three in a row, twice, and one
    alone = [loaded["qwen2"].outputs([sequence])[0, 0] for sequence in sequences]
    np.testing.assert_allclose(outputs, alone, atol=1e-5)


def test_equal_responses_get_equal_scores_wherever_they_stand(loaded):
    conversations = [chat_of("Which?", text) for text in ("a tree", "b", "a tree", "c c c c", "b", "a tree")]
    scores = loaded["llama"].score(conversations)
    assert scores[0] == scores[2] == scores[5] and scores[1] == scores[4] and len(set(scores)) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_resolution_bounds_what_places_in_a_row_do_to_a_score(dtype, foreign):
    """Alone, in trees, beside others and in rows of other lengths; it is no more than a few times what is found."""
    model = RewardModel.load(foreign["qwen2"], dtype=dtype)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 300, n).astype(np.int32) for n in (9, 40, 70, 110)]
    sequences = [
        np.concatenate([p, rng.integers(5, 300, 6 + 3 * i)]).astype(np.int32) for p in prompts for i in range(4)
    ]
    found = []
    for calls in (1, 2, 4, 8):
        found.append(np.empty(16))
        for members in np.split(rng.permutation(16), calls):
            found[-1][members] = model.outputs([sequences[i] for i in members])[:, 0]
    found = np.array([*found, [model.outputs([s])[0, 0] for s in sequences]])
    moved = np.ptp(found, axis=0).max()
    print(dtype, moved, model.resolution, found.std())
    assert 0 < moved <= model.resolution < 0.2 * found[0].std()


def test_the_resolution_is_in_units_of_the_head(foreign, loaded):
    model = loaded["qwen2"]
    doubled = dataclasses.replace(reward_model.Kind.of(Path(foreign["qwen2"]), hf.read_config(foreign["qwen2"])))
    params = {**model.params, "score": {"kernel": 2 * model.params["score"]["kernel"]}}
    other = RewardModel(model.chat, model.config, params, model.mesh, "float32", doubled)
    assert other.resolution == pytest.approx(2 * model.resolution)


def test_many_conversations_in_several_batches(loaded, monkeypatch):
    monkeypatch.setitem(engine.BATCH_TOKENS, "cpu", 512)
    conversations = [chat_of(f"question {i // 3}", f"answer {i}") for i in range(60)]
    scores = loaded["llama"].score(conversations)
    monkeypatch.undo()
    np.testing.assert_allclose(loaded["llama"].score(conversations), scores, atol=1e-5)
    assert len(set(np.round(scores, 4))) > 50


def test_bfloat16_weights_are_scored_in_float32(tmp_path, tokenizer_dir):  # NUMERICS 7a
    directory = make_model(tmp_path, "qwen3", tokenizer_dir, dtype="bfloat16")
    assert hf.read_config(directory)["dtype"] == "bfloat16"
    scores = RewardModel.load(directory).score(CONVERSATIONS)
    np.testing.assert_allclose(scores, hf_scores(directory, CONVERSATIONS, batched=True), atol=1e-4)


def test_computing_in_bfloat16_is_near(foreign, loaded):
    model = RewardModel.load(foreign["qwen2"], dtype="bfloat16")
    assert model.params["decoder"]["embed"]["embedding"].dtype == jnp.bfloat16
    scores, exact = (np.array(m.score(CONVERSATIONS)) for m in (model, loaded["qwen2"]))
    assert 1e-4 < np.abs(scores - exact).max() < 0.3


def test_is_offered_by_the_package_and_takes_nothing(loaded):
    assert rmjax.RewardModel is RewardModel
    assert loaded["qwen2"].score([]) == []


# Refusals


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (chat_of("Hello?"), "conversation 1: .*ends with user, expected an assistant turn"),
        ([], "conversation 1: .*ends with nothing"),
        ("Hello?", "conversation 1: a conversation must be a list of messages, got str"),
        ([{"role": "robot", "content": "x"}], "conversation 1: role 'robot' is none of"),
        (chat_of("a", None), "conversation 1: the last assistant turn has no text"),
        (chat_of("a", " "), "conversation 1: the last assistant turn has no text"),
        (chat_of("a", "\ud83d"), "conversation 1: .*is no Unicode"),
    ],
)
def test_a_bad_conversation_is_named(conversation, message, loaded):
    with pytest.raises(reward_model.BadConversation, match=message):
        loaded["qwen2"].score([CONVERSATIONS[0], conversation])


def test_a_token_without_an_embedding_is_refused(loaded):
    vocab = loaded["qwen2"].config.vocab
    with pytest.raises(ValueError, match=f"token {vocab} has no row in the model's embedding of {vocab}"):
        loaded["qwen2"].outputs([[1, 2], [1, vocab]])


def test_texts_and_ids_that_are_not_whole_are_refused_or_completed(loaded):
    model, conversation = loaded["qwen2"], chat_of("Which?", "a tree")
    text = model.chat.tokenizer.apply_chat_template(conversation, tokenize=False)
    (wanted,) = model.score([conversation])
    assert model.score_texts([text]) == model.score_tokens(model.chat.encode([text])) == [wanted]
    for part in (text.removesuffix("\n"), text.removesuffix("<|im_end|>\n")):
        for score, given in ((model.score_texts, part), (model.score_tokens, model.chat.encode([part])[0])):
            with pytest.raises(reward_model.BadConversation, match=r"conversation 1: it ends with .* lacks"):
                score([text if isinstance(given, str) else model.chat.encode([text])[0], given])
            assert score([given], complete=True) == [wanted]
    with pytest.raises(reward_model.BadConversation, match="conversation 0: it begins with 'a tree"):
        model.score_texts(["a tree"], complete=True)


def test_a_directory_without_a_score_head_is_refused(tmp_path, tokenizer_dir):
    make_model(tmp_path, "llama", tokenizer_dir, head=False)
    with pytest.raises(ValueError, match=r"has no score head: no score\.weight"):
        RewardModel.load(tmp_path)


def test_a_classifier_of_two_labels_gives_no_one_reward(tmp_path, tokenizer_dir):
    make_model(tmp_path, "llama", tokenizer_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    sizes = {**tiny_models.SIZES, "vocab_size": len(tokenizer)}
    config = transformers.AutoConfig.for_model("llama", **sizes, num_labels=2)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = RewardModel.load(tmp_path)  # transformers leaves its default of two labels out of config.json
    assert set(model.values(CONVERSATIONS[:1])) == {"LABEL_0", "LABEL_1"}
    with pytest.raises(ValueError, match="LABEL_0, LABEL_1, not one reward; call `values`"):
        model.score(CONVERSATIONS[:1])


def test_a_tokenizer_without_a_template_is_refused(foreign, tmp_path):
    directory = shutil.copytree(foreign["llama"], tmp_path / "x")
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        RewardModel.load(directory)


def test_nowhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        RewardModel.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config\.json"):
        RewardModel.load(tmp_path)


# Templates with arguments


@pytest.fixture(scope="session")
def dated(foreign, tmp_path_factory):
    """A foreign directory whose template reads the clock, as Llama 3's does."""
    directory = shutil.copytree(foreign["llama"], tmp_path_factory.mktemp("dated") / "x")
    (directory / "chat_template.jinja").write_text(CLOCK)
    return directory


def test_template_arguments_fix_the_date(dated):  # NUMERICS 4
    with pytest.raises(ValueError, match="inserts today's date"):
        RewardModel.load(dated)
    model = RewardModel.load(dated, template_kwargs=JULY)
    scores = model.score(CONVERSATIONS[:4])
    np.testing.assert_allclose(scores, hf_scores(dated, CONVERSATIONS[:4], batched=True, **JULY), atol=1e-4)


def test_template_arguments_of_a_contract_hold(dated, tmp_path):
    written = write_export(tmp_path / "export", RewardModel.load(dated, template_kwargs=JULY))
    model = RewardModel.load(written)
    assert model.chat.template_kwargs == JULY
    scores = hf_scores(written, CONVERSATIONS[:3], batched=True, **JULY)
    np.testing.assert_allclose(model.score(CONVERSATIONS[:3]), scores, atol=1e-4)
    RewardModel.load(written, template_kwargs=JULY)
    with pytest.raises(ValueError, match=r"differ from the score contract's .*26 Jul 2024"):
        RewardModel.load(written, template_kwargs={"date_string": "1 Jan 2025"})


# Exports


def write_export(directory, source, dtype="auto"):
    """Exports the parameters of a loaded model as training does."""
    config = defaults()
    config.export.dtype = dtype
    texts = [source.chat.render(c) for c in CONVERSATIONS]
    trees = [build_tree([ids]) for ids in source.chat.encode(texts)]
    family = source.config.family
    values = {
        **tiny_models.SIZES,
        **tiny_models.FAMILIES[family],
        "model_type": family,
        "max_position_embeddings": 1024,
    }
    export.write_export(
        directory,
        jax.tree.map(jnp.copy, source.params),  # they are deleted when written
        objective=BradleyTerry(),
        config=config,
        values={**values, "vocab_size": source.config.vocab},
        model=source.config,
        chat=source.chat,
        metrics={"validation/reward_mean": 0.5, "validation/reward_std": 2.0},
        data="0",
        golden=export.golden_sequences(
            SimpleNamespace(lengths=np.array(list(map(len, trees))), group=lambda i: SimpleNamespace(tree=trees[i]))
        ),
    )
    return directory


@pytest.fixture(scope="session")
def written(loaded, tmp_path_factory):
    """A small export with a contract."""
    return write_export(tmp_path_factory.mktemp("written") / "export", loaded["llama"])


@pytest.fixture
def copied(written, tmp_path):
    """A copy of it, to spoil."""
    return shutil.copytree(written, tmp_path / "copied")


def test_golden_rows_equal_transformers(written, loaded):
    import torch

    terms = contract.read(written)
    assert (terms["reward_mean"], terms["reward_std"]) == (0.5, 2.0)
    golden = terms["golden"]
    assert len(golden) == 1 + export.GOLDEN and golden[0]["text"] == loaded["llama"].chat.render(PROBE)
    model = hf_model(written)
    for row in golden:
        with torch.no_grad():
            score = model(torch.tensor([row["token_ids"]])).logits.item()
        assert row["at"] == [len(row["token_ids"]) - 1] and np.abs(score - np.array(row["outputs"])).max() <= 1e-4
    assert reward_model.load_checked(written).score(CONVERSATIONS[:2])
    assert reward_model.load_checked(written, dtype="bfloat16").dtype == "bfloat16"


def test_a_bfloat16_export_keeps_its_scores(loaded, tmp_path):  # NUMERICS 7a
    directory = write_export(tmp_path / "export", loaded["qwen3"], dtype="bfloat16")
    model = RewardModel.load(directory)
    scores = model.score(CONVERSATIONS)
    np.testing.assert_allclose(scores, hf_scores(directory, CONVERSATIONS, batched=True), atol=1e-4)
    assert np.abs(np.subtract(scores, loaded["qwen3"].score(CONVERSATIONS))).max() > 1e-4  # they were rounded
    reward_model.load_checked(directory)


def test_another_template_breaks_the_contract(copied):
    (copied / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", "<|im_end|> "))
    with pytest.raises(ValueError, match=r"contract does not hold(.|\n)*template is not the one it was trained with"):
        RewardModel.load(copied)


def test_other_tokens_break_the_contract(copied):
    values = json.loads((copied / "tokenizer.json").read_text())
    values["model"]["merges"] = values["model"]["merges"][:5]
    (copied / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="golden row 0 is split into other tokens"):
        RewardModel.load(copied)


def test_another_rule_or_version_breaks_the_contract(copied):
    terms = contract.read(copied)
    contract.write(copied, {**terms, "scored_token": "the first"})
    with pytest.raises(ValueError, match="its scored token is 'the first'"):
        RewardModel.load(copied)
    contract.write(copied, {**terms, "version": 7})
    with pytest.raises(ValueError, match="is of version 7"):
        RewardModel.load(copied)
    (copied / contract.FILE).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        RewardModel.load(copied)


def test_other_weights_break_the_contract(copied):
    config = (copied / "config.json").read_bytes()
    tiny_models.make_hf_model("llama", copied, seed=1, vocab_size=hf.read_config(copied)["vocab_size"])
    (copied / "config.json").write_bytes(config)
    RewardModel.load(copied)  # tokenizer and template are right
    with pytest.raises(ValueError, match="has another norm than in the score contract"):
        reward_model.load_checked(copied)


def test_text_that_does_not_come_back_is_left_out_of_golden_rows(loaded):
    chat = loaded["qwen2"].chat  # its normalizer composes characters
    pieces = chat.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("e\u0301")
    ids = chat.tokenizer.convert_tokens_to_ids([byte for piece, _ in pieces for byte in piece])
    rows = contract.golden_rows(chat, [(ids, [0]), (chat.encode(["A plant."])[0], [0])])
    assert [row["text"] for row in rows[1:]] == [None, "A plant."]
    assert rows[1]["token_ids"] == ids


@pytest.mark.parametrize("module", ["contract", "save_pretrained", "scores"])
def test_an_interrupted_export_leaves_the_old_one(module, copied, loaded, monkeypatch):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    source = RewardModel.load(copied)
    targets = {
        "contract": (contract, "write"),
        "save_pretrained": (type(source.chat.tokenizer), "save_pretrained"),
        "scores": (RewardModel, "replay"),
    }
    monkeypatch.setattr(*targets[module], stop)
    with pytest.raises(KeyboardInterrupt):
        write_export(copied, source)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


# The tokenizer that transformers makes of an export


def test_a_tokenizer_that_a_family_would_rebuild_is_refused(tokenizer_dir, foreign):
    chat = Chat(load_tokenizer(tokenizer_dir))
    beside_qwen2 = transformers.AutoTokenizer.from_pretrained(str(foreign["qwen2"]))  # the same files
    assert chat.encode(["a  b"]) != [beside_qwen2("a  b")["input_ids"]]
    with pytest.raises(ValueError, match=r"cannot be exported with a qwen2 model: .* as Qwen2Tokenizer"):
        export.check_tokenizer(chat, {"model_type": "qwen2"})
    for family in ("qwen3", "llama", "mistral"):
        export.check_tokenizer(chat, {"model_type": family})


def test_the_demos_tokenizer_goes_with_every_family(tmp_path):
    synthetic.make_tokenizer(tmp_path)
    chat = Chat(load_tokenizer(tmp_path))
    for family in FAMILIES:
        export.check_tokenizer(chat, {"model_type": family})


@pytest.mark.parametrize("pad", ["<|im_end|>", "\u010a"])
def test_padding_that_looks_like_text_is_refused(pad, tokenizer_dir):  # NUMERICS 1
    chat = Chat(load_tokenizer(tokenizer_dir))
    chat.tokenizer.pad_token = pad  # EOS, and the newline that ends a rendering
    with pytest.raises(ValueError, match="is EOS or ends the chat template"):
        export.check_tokenizer(chat, {"model_type": "llama"})


# Exports of real runs


@pytest.fixture(scope="session")
def run_small(tmp_path_factory):
    """Runs the small demo in this process; returns the workdir."""
    cache = tmp_path_factory.mktemp("cache")

    def run(workdir, **values):
        config = runpy.run_path(str(ROOT / "configs" / "bt_tiny.py"))["get_config"]()
        small = {
            "duration": "8 steps",
            "data.train": "synthetic://pairs?n=120&seed=0",
            "data.validation": "synthetic://pairs?n=20&seed=1",
            "data.cache_dir": str(cache),
            "plan.groups_per_step": 16,
            "plan.row_tokens": 256,
            "eval.every": "8 steps",
            "eval.train_groups": 0,
            "log.to": "",
        }
        config.update_from_flattened_dict(small | {key.replace("__", "."): value for key, value in values.items()})
        training.run(config, workdir)
        return workdir

    return run


def base_model(directory, *, head):
    """A base with the demo's tokenizer."""
    synthetic.make_tokenizer(directory)
    tiny_models.make_hf_model("llama", directory, head=head, vocab_size=640, max_position_embeddings=1024)
    return directory


ONE_STEP = {"model__tokenizer": "", "duration": "1 steps", "eval__every": "1 steps", "optim__learning_rate": 1e-9}


@pytest.fixture(scope="session")
def kept(run_small, tmp_path_factory):
    """A run of one small step from a base that is a reward model: the base, the export, and what was printed."""
    base = base_model(tmp_path_factory.mktemp("base"), head=True)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run = run_small(tmp_path_factory.mktemp("run"), model__init_from=str(base), **ONE_STEP)
    return base, run / "export", output.getvalue()


@pytest.fixture(scope="session")
def exported(kept):
    return kept[1]


@pytest.fixture(scope="session")
def plain_texts():
    """Conversations in the demo's words, of uneven lengths."""
    rows = list(synthetic.rows("pairs", n=12, seed=5))
    return [[*row["prompt"], *row[side]] for row in rows for side in ("chosen", "rejected")]


def test_an_export_scores_alike_in_transformers(exported, plain_texts):  # NUMERICS 3, 16
    model = RewardModel.load(exported)
    scores = model.score(plain_texts)
    for batched in (True, False):
        np.testing.assert_allclose(scores, hf_scores(exported, plain_texts, batched=batched), atol=1e-4)
    order = np.random.default_rng(0).permutation(len(scores))
    np.testing.assert_allclose(model.score([plain_texts[i] for i in order]), np.array(scores)[order], atol=1e-5)
    reward_model.load_checked(exported)


def test_an_export_says_what_it_is(exported):  # NUMERICS 16, 17
    values = hf.read_config(exported)
    assert values["architectures"] == ["LlamaForSequenceClassification"]
    assert (values["num_labels"], values["id2label"]) == (1, {"0": "LABEL_0"})
    assert values["problem_type"] == "regression" and values["dtype"] == values["torch_dtype"] == "float32"
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(exported))
    assert values["pad_token_id"] == tokenizer.pad_token_id
    closing = {tokenizer.eos_token_id, *tokenizer("<|im_end|>\n")["input_ids"]}
    assert tokenizer.pad_token_id not in closing  # NUMERICS 1
    terms = contract.read(exported)
    assert terms["pad_token_id"] == tokenizer.pad_token_id and terms["eos_token_id"] == tokenizer.eos_token_id
    assert terms["reward_mean"] == terms["metrics"]["validation/reward_mean"]


def test_the_scored_token_is_the_last_of_the_rendering(exported, plain_texts):  # NUMERICS 2
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(exported))
    ids = tokenizer.apply_chat_template(plain_texts[0], return_dict=False)
    assert tokenizer.decode(ids[-2:]) == "<|im_end|>\n"
    backbone, head = hf_model(exported).model, load_file(exported / "model.safetensors")["score.weight"]
    with torch.no_grad():
        at = backbone(torch.tensor([ids])).last_hidden_state[0].numpy() @ head[0]
    score = RewardModel.load(exported).score(plain_texts[:1])[0]
    assert abs(at[-1] - score) <= 1e-4 < abs(at[-2] - score)


def test_a_base_that_is_a_reward_model_keeps_its_head(kept, plain_texts):  # NUMERICS 14
    base, exported, output = kept
    head, after = (load_file(path / "model.safetensors")["score.weight"] for path in (base, exported))
    assert f"score head: kept, norm {np.linalg.norm(head):.4g}" in output
    np.testing.assert_allclose(after, head, atol=1e-7)
    scores = RewardModel.load(exported).score(plain_texts)
    np.testing.assert_allclose(scores, hf_scores(base, plain_texts, batched=True), atol=1e-4)


@pytest.mark.slow
def test_a_base_without_a_head_gets_a_new_one(run_small, tmp_path, capsys, plain_texts):
    base = base_model(tmp_path / "base", head=False)
    run = run_small(tmp_path / "run", model__init_from=str(base), **ONE_STEP)
    after = load_file(run / "export" / "model.safetensors")["score.weight"]
    assert after.shape == (1, 48) and 0.01 < after.std() < 0.04  # initializer_range is 0.02
    assert f"score head: new, norm {np.linalg.norm(after):.4g}" in capsys.readouterr().out
    scores = RewardModel.load(run / "export").score(plain_texts)
    np.testing.assert_allclose(scores, hf_scores(run / "export", plain_texts, batched=True), atol=1e-4)


@pytest.mark.slow
def test_the_export_of_a_run_from_scratch(run_small, tmp_path, plain_texts):
    exported = run_small(tmp_path) / "export"
    assert hf.read_config(exported)["architectures"] == ["Qwen2ForSequenceClassification"]
    scores = reward_model.load_checked(exported).score(plain_texts)
    for batched in (True, False):
        np.testing.assert_allclose(scores, hf_scores(exported, plain_texts, batched=batched), atol=1e-4)


def test_a_tokenizer_that_cannot_be_exported_stops_a_run_at_its_start(run_small, tmp_path, tokenizer_dir):
    with pytest.raises(ValueError, match="cannot be exported with a qwen2 model"):
        run_small(tmp_path, model__tokenizer=str(tokenizer_dir))

"""Rows in the shape of public ones, with the traps that those hold, through a template that thinks."""

import json

import numpy as np
import pytest
from small_sets import SETS

from rmjax.batches import groups as groups_lib
from rmjax.batches import token_cache
from rmjax.batches.chat import Chat, load_tokenizer, set_pad_token
from rmjax.batches.tasks import Example, Preferences
from rmjax.data import ledger, sources


@pytest.fixture(scope="session")
def chat(thinking_dir):
    chat = Chat(load_tokenizer(thinking_dir), max_length=16384)
    set_pad_token(chat)
    return chat


@pytest.fixture
def build(chat, tmp_path):
    def call(source, ties="skip", **kwargs):
        arguments = {"workers": 0, "cache_dir": tmp_path, "max_bad_fraction": 0.1, **kwargs}
        return token_cache.build(str(source), chat, Preferences(ties), **arguments)

    return call


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(row, response):
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    history = [{"role": roles[m["from"]], "content": m["value"]} for m in row["conversations"]]
    value = row[response]
    return [*history, {"role": "assistant", "content": value if isinstance(value, str) else value["value"]}]


def reference(chat, conversation):
    return chat.tokenizer.apply_chat_template(conversation, return_dict=False)


@pytest.mark.parametrize("name", ["pairs.json", "chinese_pairs.json", "pairs_of_texts.jsonl"])
def test_conversations(build, chat, small_sets, name):
    raw = SETS[name]
    groups = build(small_sets / name)
    assert len(groups) == groups.audit.rows == len(raw) and not groups.audit.reasons
    for i in range(len(raw)):
        expected = [reference(chat, turns(raw[i], response)) for response in ("chosen", "rejected")]
        assert [path.tolist() for path in groups.group(i).tree.sequences()] == expected
    # Prompts repeat across rows; a split keeps them together.
    assert len(np.unique(groups.prompt_ids)) == len({json.dumps(row["conversations"]) for row in raw})
    train, validation = groups_lib.split(groups, 0.2, 0)
    assert ledger.shared_prompts(train, validation) == 0
    assert (groups.unshared > groups.lengths).all()


def ranked(node, history=()):
    """Yields (history, ranked replies) of every node with at least two replies that are all ranked."""
    role = "user" if node["role"] == "prompter" else "assistant"
    history = [*history, {"role": role, "content": node["text"]}]
    replies = node["replies"]
    if len(replies) > 1 and all(reply.get("rank") is not None for reply in replies):
        yield history, sorted(replies, key=lambda reply: reply["rank"])
    for reply in replies:
        yield from ranked(reply, history)


def test_open_assistant(build, chat, small_sets):
    found = [group for row in SETS["trees.jsonl"] for group in ranked(row["prompt"])]
    groups = build(small_sets / "trees.jsonl")
    assert len(groups) == len(np.unique(groups.prompt_ids)) == len(found) == 18
    assert groups.comparisons.sum() == 8 * 4 + 2
    # Two messages have replies of which one was not ranked; the rest of their trees is used.
    assert {reason: (c.rows, c.kept) for reason, c in groups.audit.reasons.items()} == {"no_label": (2, 2)}
    for i in range(18):
        history, replies = found[i]
        group = groups.group(i)
        expected = [reference(chat, [*history, {"role": "assistant", "content": r["text"]}]) for r in replies]
        best_first = np.argsort(-group.labels["wins"].sum(axis=1), kind="stable")
        assert [group.tree.sequences()[j].tolist() for j in best_first] == expected


def votes(row):
    """Shares of the votes: response 1 is better, response 2 is, a tie."""
    given = [row[f"annotator{i}"] for i in (1, 2, 3)]
    return [given.count(v) / 3 for v in (1, 2, 0)]


def test_pandalm(build, small_sets, tmp_path):
    raw = SETS["votes.json"]
    groups = build(small_sets / "votes.json", ties="keep")
    counted = {reason: count.rows for reason, count in groups.audit.reasons.items()}
    assert counted.pop("wrong_type") == 4  # JSON `true`
    assert counted.pop("empty_response") == 6
    assert not counted and len(groups) == 110
    assert len(np.unique(groups.prompt_ids)) == 24
    for i in range(len(groups)):
        group = groups.group(i)
        said = [group.labels["wins"][0, 1], group.labels["wins"][1, 0], group.labels["ties"][0, 1]]
        shares = votes(raw[int(group.id.split(":")[1])])
        np.testing.assert_allclose(said, shares, rtol=1e-6)
        np.testing.assert_allclose(groups.agreements[i], max(shares), rtol=1e-6)
    # Its own convention (0 is a tie, 1 and 2 are the responses) is refused for pairs rather than guessed.
    own = [{"prompt": "q", "chosen": "a", "rejected": "b", "preference": r["annotator1"]} for r in raw]
    with pytest.raises(ValueError, match="preference runs from 0 to 2"):
        build(write(tmp_path / "own.jsonl", own))


def test_a_response_that_begins_with_a_newline(chat, request):
    # The template's "assistant\n" and the newline are one token in Qwen's vocabulary, two in others'.
    joins_newlines = request.node.callspec.params["thinking_dir"] == "RUNS"
    template = chat.tokenizer.chat_template
    turn = "'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'"
    chat.tokenizer.chat_template = "{% for m in messages %}{{" + turn + "}}{% endfor %}"
    try:
        start = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        answers = ("yes", "\nyes")
        *both, prompt = chat.encode([*(f"{start}{answer}<|im_end|>\n" for answer in answers), start])
        merges = len(chat.encode(["\n\n"])[0]) == 1
        assert merges == joins_newlines
        assert both[0][: len(prompt)] == prompt and (both[1][: len(prompt)] != prompt) == merges
        asked = [{"role": "user", "content": "q"}]
        both_asked = tuple((*asked, {"role": "assistant", "content": answer}) for answer in answers)
        tree = chat.groups([Example(both_asked)])[0].tree
        assert [path.tolist() for path in tree.sequences()] == both
    finally:
        chat.tokenizer.chat_template = template


def test_what_conversations_share_is_tokenized_as_it_is_alone(chat):
    assert_tokenized_alone(chat, SETS["pairs.json"])


@pytest.mark.parametrize("name", ["minimind", "qwen-derived"])
def test_public_tokenizers_on_public_rows(public_file, name):
    """Vocabularies of 6,400 and 151,669 entries on texts that nobody wrote for a test."""
    chat = Chat(load_tokenizer(public_file(f"tokenizers/{name}")), max_length=16384)
    path = public_file("llama-factory/dpo_en_demo.json")
    assert_tokenized_alone(chat, [row for _, row in sources.open_source(str(path))][:60])


def assert_tokenized_alone(chat, rows):
    texts = [chat.render(turns(row, response)) for row in rows for response in ("chosen", "rejected")]
    texts += [text[: len(text) * 2 // 3] for text in texts] + [
        text.replace("<|im_end|>", "<|im_end|>\n") for text in texts
    ]
    texts.sort()  # neighbours that share a part, and others that do not
    assert chat.encode(texts) == chat.tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_what_the_templates_add_is_named(chat):
    assert any("empty thinking block" in note for note in chat.notes)


def test_padding_is_none_of_what_ends_a_rendering(chat):
    tokenizer = chat.tokenizer
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>"), *newline}
    assert tokenizer.pad_token_id not in {*ends, tokenizer.eos_token_id}
    assert ends == chat.closing

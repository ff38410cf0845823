"""Rendering, tokens, the length policy and the checks of templates; the reference is transformers."""

import concurrent.futures
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from rmjax.batches import rendering
from rmjax.batches.chat import Chat, load_tokenizer, set_pad_token
from rmjax.batches.tasks import Example
from rmjax.batches.trees import Tree
from rmjax.data.records import BadRow, pair

LLAMA_3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{{ '<|im_start|>system\nToday Date: ' + date_string + '<|im_end|>' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)


def talk(*texts, system=None):
    """A conversation of alternating user and assistant turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def reference(chat, conversation):
    """Token ids as transformers gives them to the model."""
    return chat.tokenizer.apply_chat_template(conversation, return_dict=False, **chat.template_kwargs)


def trees(chat, records, keep=False):
    """The tree of each record, or why there is none."""
    examples = [Example(r.conversations, tools=r.tools) for r in records]
    return [getattr(made, "tree", made) for made in chat.groups(examples, keep=keep)]


def paths(tree):
    return [sequence.tolist() for sequence in tree.sequences()]


def test_paths_of_the_tree_are_what_transformers_tokenizes(tokenizer):
    chat = Chat(tokenizer)
    records = [
        pair(talk("What is a tree?", "A plant."), talk("What is a tree?", "A graph.")),
        pair(talk("a", "b", "c", "d", system="s"), talk("a", "other", "c", "e", system="s")),
        pair(talk("What is a tree?", "A plant."), talk("What is a tree?", "Late\n")),
    ]
    for record, tree in zip(records, trees(chat, records)):
        assert paths(tree) == [reference(chat, list(c)) for c in record.conversations]
        np.testing.assert_array_equal(tree.end_slot, [0, 1])
        # Qwen's rule: the newline after <|im_end|> is scored (NUMERICS 2).
        newline = tokenizer.convert_tokens_to_ids("Ċ")
        assert tree.tokens[tree.end].tolist() == [newline, newline]


def trained(tokenizer, **parts):
    """A BPE with other parts, and the special tokens and the template of `tokenizer`."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    for name, part in parts.items():
        setattr(backend, name, part)
    special = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
    words = ["user question", "assistant question\n", "a question e \u0301", "<|im_ end|>"] * 9
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    fast.chat_template = tokenizer.chat_template
    return fast


def metaspace(tokenizer):
    """As Llama 2's newer files: the first word of a text gets a space, what follows a special token does not."""
    made = trained(tokenizer, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"))
    first, later = made(["question", "<|im_end|>question"], add_special_tokens=False)["input_ids"]
    assert later[1:] != first
    return made


def prepends(tokenizer):
    """As Llama 2's older files: a space before every text, and after every special token."""
    parts = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    return trained(tokenizer, normalizer=normalizers.Sequence(parts))


def strips(tokenizer):
    """Special tokens that take the spaces beside them."""
    path = Path(tokenizer.name_or_path) / "tokenizer.json"
    settings = json.loads(path.read_text())
    for token in settings["added_tokens"]:
        token["lstrip"] = token["rstrip"] = token["content"] == "<|im_start|>"
    backend = Tokenizer.from_str(json.dumps(settings))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.chat_template = tokenizer.chat_template
    assert len(made("e \n<|im_start|> \n e", add_special_tokens=False)["input_ids"]) == 3
    return made


def longer(tokenizer):
    """A token that begins as a special one does."""
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|im_end|> question")])
    return tokenizer


def splits(tokenizer):
    """Special tokens are text like any other."""
    tokenizer.split_special_tokens = True
    return tokenizer


@pytest.mark.parametrize("change", [None, metaspace, prepends, strips, longer, splits])
def test_what_texts_share_is_tokenized_as_it_is_alone(tokenizer, change):
    tokenizer = change(tokenizer) if change else tokenizer
    chat = Chat(tokenizer)
    rng = random.Random(0)
    pieces = [
        "\n",
        " ",
        "question",
        " question",
        "user",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_",
        "end|>",
        "e",
        "\u0301",
        "<s>",
    ]
    draw = lambda most: "".join(rng.choices(pieces, k=rng.randint(0, most)))
    texts = []
    for _ in range(300):
        prompt = draw(20)
        texts += [prompt[: rng.randint(0, len(prompt))] + draw(8) for _ in range(2)] + [
            prompt + draw(8) for _ in range(3)
        ]
    expected = [tokenizer([text], add_special_tokens=False)["input_ids"][0] for text in texts]
    assert chat.encode(texts) == expected and chat.encode([]) == []


def test_a_shared_prompt_is_tokenized_once(tokenizer, monkeypatch):
    chat, seen = Chat(tokenizer), []
    encode = chat._encoder._encode
    monkeypatch.setattr(chat._encoder, "_encode", lambda texts: seen.extend(texts) or encode(texts))
    prompt = "What is a tree? " * 20
    renderings = [chat.render(talk(prompt, answer)) for answer in ("A plant.", "A graph.", "Late")]
    assert chat.encode(renderings) == [
        reference(chat, talk(prompt, answer)) for answer in ("A plant.", "A graph.", "Late")
    ]
    assert seen == [renderings[0], *(f"<|im_start|>assistant\n{answer}<|im_end|>\n" for answer in ("A graph.", "Late"))]


def test_a_response_that_begins_with_a_newline_merges_with_the_header(tokenizer):
    chat = Chat(tokenizer)
    first, second = talk("q", "\nyes"), talk("q", "yes")
    prompt = chat.encode([chat.render(first[:1]) + "<|im_start|>assistant\n"])[0]
    tokens = reference(chat, first)
    assert tokens[: len(prompt)] != prompt  # a prefix of the text that is none of the tokens
    tree = trees(chat, [pair(first, second)])[0]
    assert paths(tree) == [tokens, reference(chat, second)]


def test_each_distinct_conversation_is_rendered_once(tokenizer, monkeypatch):
    chat = Chat(tokenizer)
    rendered = []
    render = chat.render
    monkeypatch.setattr(chat, "render", lambda c, tools=None: rendered.append(c) or render(c, tools))
    a, b, c = (talk("q", x) for x in "abc")
    made = trees(chat, [pair(a, b), pair(b, c), pair(a, c)])
    assert len(rendered) == 3 and all(isinstance(t, Tree) for t in made)


def test_what_the_template_refuses_is_a_bad_row_and_others_are_not_touched(tokenizer):
    tokenizer.chat_template = STRICT
    chat = Chat(tokenizer)
    good = pair(talk("q", "a"), talk("q", "b"))
    bad = pair(talk("q", "a", system="s"), talk("q", "b", system="s"))
    first, second, third = trees(chat, [good, bad, good])
    assert isinstance(second, BadRow) and second.reason == "template_error"
    assert "no system messages" in second.detail
    np.testing.assert_array_equal(first.tokens, third.tokens)
    # Half of a surrogate pair, which JSON allows; a record refuses it in a content, the rendering anywhere else.
    half = dataclasses.replace(good, conversations=(talk("q", "a"), talk("q", "\ud83d")))
    assert [getattr(t, "reason", None) for t in trees(chat, [good, half])] == [None, "wrong_type"]


def test_responses_that_the_template_makes_equal(tokenizer):
    tokenizer.chat_template = LLAMA_3.replace("{{ bos_token }}", "")
    chat = Chat(tokenizer, template_kwargs={"date_string": "1 Jan 2025"})
    record = pair(talk("q", "yes"), talk("q", "yes  "))
    assert trees(chat, [record])[0].reason == "identical_responses"
    assert len(trees(chat, [record], keep=True)[0].end) == 2


def test_one_bos_where_both_tokenizer_and_template_have_one(tokenizer):
    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.bos_token = "<s>"
    adds_bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.backend_tokenizer.post_processor = adds_bos
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert tokenizer("hi")["input_ids"][0] == bos
    chat = Chat(tokenizer)
    conversation = talk("q", "a")
    tokens = chat.encode([chat.render(conversation)])[0]
    assert tokens.count(bos) == 1 and tokens[0] == bos
    assert tokens == reference(chat, conversation)


def test_a_template_with_todays_date_is_refused_until_the_date_is_fixed(tokenizer):
    tokenizer.chat_template = LLAMA_3
    tokenizer.bos_token = "<s>"
    with pytest.raises(ValueError, match=r"today's date.*date_string") as error:
        Chat(tokenizer)
    for where in ("config.data.template_kwargs in training", "--template_kwargs in scoring"):
        assert where in str(error.value)
    chat = Chat(tokenizer, template_kwargs={"date_string": "26 Jul 2024"})
    assert any("inserts a date ('26 Jul 2024')" in note for note in chat.notes)
    assert "Today Date: 26 Jul 2024" in chat.render(talk("q", "a"))
    other = Chat(tokenizer, template_kwargs={"date_string": "27 Jul 2024"})
    assert chat.fingerprint() != other.fingerprint()


def test_notes_name_what_a_template_adds(tokenizer):
    assert Chat(tokenizer).notes == []
    plain = tokenizer.chat_template
    tokenizer.chat_template = plain + "{{ '<|im_start|>assistant\n' }}"
    assert "header of another assistant turn ('<|im_start|>assistant')" in " ".join(Chat(tokenizer).notes)
    thinking = "('<think>\n\n</think>\n\n' if loop.last else '') + m.content"
    tokenizer.chat_template = plain.replace("m.content", thinking)
    assert "empty thinking block" in " ".join(Chat(tokenizer).notes)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    assert Chat(tokenizer).notes == []


def test_bad_arguments(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="over_long='cut'"):
        Chat(tokenizer, over_long="cut")
    with pytest.raises(ValueError, match="'tokenize' is set by rmjax"):
        Chat(tokenizer, template_kwargs={"tokenize": True})
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ValueError, match=r"cannot render a plain conversation.*never"):
        Chat(tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')  # enough for transformers to make an empty one
    with pytest.raises(FileNotFoundError, match=f"no tokenizer files in {tmp_path}"):
        load_tokenizer(tmp_path)


def multi_turn(response):
    return talk("first " * 8, "one", "second " * 8, "two", "third", response, system="be brief")


def length(chat, conversation):
    return len(reference(chat, conversation))


def test_drop_is_the_default_and_says_the_length(tokenizer):
    record = pair(multi_turn("yes"), multi_turn("no " * 5))
    longest = max(length(Chat(tokenizer), list(c)) for c in record.conversations)
    assert isinstance(trees(Chat(tokenizer, max_length=longest), [record])[0], Tree)
    bad = trees(Chat(tokenizer, max_length=longest - 1), [record])[0]
    assert (bad.reason, bad.tokens) == ("over_long", longest)


def test_truncate_prompt_leaves_out_the_oldest_exchanges_of_both(tokenizer):
    chosen, rejected = multi_turn("yes"), multi_turn("no " * 9)
    without = lambda c, n: [c[0], *c[1 + 2 * n :]]
    chat = Chat(tokenizer)
    # The chosen one would fit with one exchange more than the rejected one.
    for exchanges in (1, 2):
        limit = length(chat, without(rejected, exchanges))
        shortening = Chat(tokenizer, max_length=limit, over_long="truncate_prompt")
        tree = trees(shortening, [pair(chosen, rejected)])[0]
        assert paths(tree) == [reference(chat, without(c, exchanges)) for c in (chosen, rejected)]
    tight = Chat(tokenizer, max_length=limit - 1, over_long="truncate_prompt")
    bad = trees(tight, [pair(chosen, rejected)])[0]  # the last user turn is never left out
    assert (bad.reason, bad.tokens) == ("over_long", limit)


def test_truncate_response_cuts_both_at_the_same_place_and_keeps_the_end(tokenizer):
    chosen, rejected = talk("q", "yes " * 30), talk("q", "no " * 50)
    plain = Chat(tokenizer)
    limit = length(plain, talk("q", "no " * 10))
    tree = trees(Chat(tokenizer, max_length=limit, over_long="truncate_response"), [pair(chosen, rejected)])[0]
    decoded = [tokenizer.decode(path) for path in paths(tree)]
    header, end = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
    contents = [text.removeprefix(header).removesuffix(end) for text in decoded]
    cut = min(map(len, contents))
    assert contents == [chosen[-1]["content"][:cut], rejected[-1]["content"][:cut]]
    assert max(map(len, paths(tree))) <= limit
    one_more = [talk("q", text[-1]["content"][: cut + 1]) for text in (chosen, rejected)]
    assert max(length(plain, c) for c in one_more) > limit


def test_truncation_that_makes_responses_equal_is_named(tokenizer):
    same = "yes " * 30
    record = pair(talk("q", same + "and"), talk("q", same + "but"))
    limit = length(Chat(tokenizer), talk("q", "yes " * 20))
    chat = Chat(tokenizer, max_length=limit, over_long="truncate_response")
    assert trees(chat, [record])[0].reason == "identical_after_truncation"
    assert len(trees(chat, [record], keep=True)[0].end) == 2
    none = trees(Chat(tokenizer, max_length=5, over_long="truncate_response"), [record])[0]
    assert none.reason == "over_long"


def test_fingerprint_follows_what_decides_tokens_and_nothing_else(tokenizer, tmp_path):
    before = Chat(tokenizer).fingerprint()
    assert Chat(tokenizer, max_length=7).fingerprint() != before
    tokenizer(["some text"], padding="max_length", truncation=True, max_length=3)
    assert Chat(tokenizer).fingerprint() == before
    tokenizer.pad_token = "<|reserved_special_token_0|>"
    tokenizer.save_pretrained(tmp_path)
    saved = load_tokenizer(tmp_path)
    assert saved.pad_token == "<|reserved_special_token_0|>"
    assert Chat(saved).fingerprint() == before
    saved.chat_template += " "
    assert Chat(saved).fingerprint() != before
    saved.chat_template = tokenizer.chat_template
    saved.add_tokens(["newword"])
    assert Chat(saved).fingerprint() != before


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "Ċ"])
def test_a_pad_token_that_could_be_text_is_replaced(tokenizer, pad):
    # Missing, EOS, or what the template ends with (NUMERICS 1).
    tokenizer.pad_token = pad
    chosen, changed = set_pad_token(Chat(tokenizer))
    assert changed and tokenizer.convert_ids_to_tokens(chosen) == "<|reserved_special_token_0|>"
    assert tokenizer.pad_token_id == chosen
    assert set_pad_token(Chat(tokenizer)) == (chosen, False)


def test_a_good_pad_token_stays_and_no_replacement_is_an_error(tokenizer):
    assert set_pad_token(Chat(tokenizer)) == (tokenizer.convert_tokens_to_ids("<|endoftext|>"), False)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no unused reserved token"):
        set_pad_token(Chat(tokenizer), vocab_size=4)
    tokenizer.unk_token = "<s>"  # as Llama 2, which has nothing else to spare
    assert set_pad_token(Chat(tokenizer), vocab_size=4) == (3, True)
    tokenizer.pad_token = tokenizer.unk_token = None
    tokenizer.chat_template += "{# <|reserved_special_token_0|> #}"  # a template that knows it may write it
    with pytest.raises(ValueError, match="no unused reserved token"):
        set_pad_token(Chat(tokenizer))


def test_pooling_by_pad_id_finds_the_scored_token(tokenizer):
    # What transformers does: the right-most token that is not padding.
    tokenizer.pad_token = None
    chat = Chat(tokenizer)
    pad, _ = set_pad_token(chat)
    conversations = [talk("q", "a"), talk("a longer question", "and its answer")]
    texts = [chat.render(c) for c in conversations]
    for side in ("left", "right"):
        options = {"padding": True, "padding_side": side, "add_special_tokens": False}
        ids = tokenizer(texts, return_tensors="np", **options)["input_ids"]
        pooled = (np.arange(ids.shape[1]) * (ids != pad)).argmax(-1)
        tokens = chat.encode(texts)
        expected = [len(t) - 1 + (ids.shape[1] - len(t) if side == "left" else 0) for t in tokens]
        np.testing.assert_array_equal(pooled, expected)


def test_tools_reach_the_template(tokenizer):
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    tool = {"type": "function", "function": {"name": "look_up"}}
    chat = Chat(tokenizer)
    with_tools, without = trees(chat, [pair(talk("q", "a"), talk("q", "b"), tools=t) for t in ([tool], None)])
    assert "look_up" in tokenizer.decode(with_tools.tokens)
    assert "look_up" not in tokenizer.decode(without.tokens)


def test_what_a_template_makes_has_a_bound(tokenizer, monkeypatch):
    chat = Chat(tokenizer)
    monkeypatch.setattr(rendering, "MOST_TEXT", 20)
    with pytest.raises(BadRow, match=r"it renders to .* characters, the most is 20"):
        chat.render([{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}])


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_loops_is_stopped(tokenizer, monkeypatch):
    """On a plain conversation it is refused at once; on a row that makes it loop, the row is bad, others are not."""
    monkeypatch.setattr(rendering, "MOST_SECONDS", 0.5)
    plain = tokenizer.chat_template
    tokenizer.chat_template = LOOPS + plain
    with pytest.raises(ValueError, match=r"the chat template cannot be used: TooSlow: it is not done after 0.5 s"):
        Chat(tokenizer)
    tokenizer.chat_template = "{% if messages[0].content == 'loop' %}" + LOOPS + "{% endif %}" + plain
    chat = Chat(tokenizer)
    first, second = trees(chat, [pair(talk(text, "a"), talk(text, "b")) for text in ("loop", "q")])
    assert isinstance(first, BadRow) and "TooSlow: it is not done after 0.5 s" in first.detail
    assert isinstance(second, Tree)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # only the thread that loops is stopped
        futures = [pool.submit(chat.render, talk(text, "a")) for text in ("loop", "q", "loop", "q")]
        assert [future.exception() is None for future in futures] == [False, True, False, True]


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_a_template_that_uses_up_memory_or_the_stack_is_refused(tokenizer, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("no more")

    monkeypatch.setattr(tokenizer, "apply_chat_template", fail)
    with pytest.raises(ValueError, match=f"cannot render a plain conversation: {error.__name__}"):
        Chat(tokenizer)

"""Which tokens are learnt: against transformers' own marks where a template has them, and by hand where it has none."""

import random

import numpy as np
import pytest
from small_tokenizers import THINKING
from tokenizers import processors

from rmjax.batches import places
from rmjax.batches.chat import Chat, load_tokenizer
from rmjax.batches.tasks import Example, Span
from rmjax.judging.writing import Writing

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
STRIPPING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
)
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '\n' }}"
    "{% else %}{{ m.role + ': ' + m.content + ' <|im_end|>\n' }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ '\n\n' + m.role + ': ' + m.content }}{% endfor %}"


def talk(*texts, system=None):
    """A conversation of alternating user and assistant turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def learnt(chat, conversation, field="loss_weight", **options):
    """bool for each token of the rendering: whether it is a target; and the tokens."""
    values = {"turns": "all", **options}
    example = Writing(**values)
    spans = {
        "loss_weight": (example._learnt(conversation, 1.0),),
        "verdict": (example._verdicts(conversation, (), 1.0),),
    }
    made = chat.groups([Example((tuple(conversation),), spans=spans)])[0]
    weights = made.labels[field]
    assert weights[-1] == 0  # it has no target
    return np.concatenate([[False], weights[:-1] != 0]), made.tree.tokens


def texts_learnt(chat, conversation, **options):
    """The learnt tokens, run by run, as text."""
    mask, tokens = learnt(chat, conversation, **options)
    runs = np.split(np.arange(len(mask)), np.flatnonzero(np.diff(mask)) + 1)
    return [chat.tokenizer.decode(tokens[run]) for run in runs if mask[run[0]]]


TRAPS = [
    talk("yes", "yes", "yes", "yes"),  # which of them?
    talk("user", "assistant", "assistant", "user"),
    talk("assistant\n", "assistant\nuser\n<|im_end"),
    talk("q", "\nlate", "q", "\n\nlater", system="be brief"),
    talk("a tree", "  spaces  ", "q", "ends with a newline\n"),
    talk("q", "0", "1", "0 1", "2", "0 1 2", system="0"),
    talk("日本語", "résumé 🙂👩‍👧", "\u00a0", "ﬁne"),
    talk("q", "a" * 300),
]


def test_equals_the_assistant_mask_of_transformers(tokenizer):
    tokenizer.chat_template = MARKED
    chat = Chat(tokenizer)
    rng = random.Random(0)
    words = ["yes", "user", "assistant", "\n", " ", "tree", "<", "system", "0"]
    drawn = [talk(*("".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(2 * n))) for n in (1, 2, 3) * 5]
    for conversation in [*TRAPS, *drawn]:
        expected = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        mask, tokens = learnt(chat, conversation)
        assert tokens.tolist() == expected["input_ids"]
        np.testing.assert_array_equal(mask, np.array(expected["assistant_masks"], bool), err_msg=str(conversation))
        assert any(expected["assistant_masks"])


def test_the_last_turn_alone(tokenizer):
    chat = Chat(tokenizer)
    assert texts_learnt(chat, talk("q", "yes", "q", "yes"), turns="last") == ["yes<|im_end|>"]
    assert texts_learnt(chat, talk("q", "yes", "q", "no"), turns="all") == ["yes<|im_end|>", "no<|im_end|>"]


def test_a_template_that_strips(tokenizer):
    tokenizer.chat_template = STRIPPING
    chat = Chat(tokenizer)
    assert texts_learnt(chat, talk(" q ", "\n yes \n", "q", "a plant ")) == ["yes<|im_end|>", "a plant<|im_end|>"]


def test_the_turn_ends_with_the_next_special_token_or_with_one_token(tokenizer):
    tokenizer.chat_template = SPACED
    assert texts_learnt(Chat(tokenizer), talk("q", "yes", "q", "no")) == ["yes <|im_end|>", "no <|im_end|>"]
    tokenizer.chat_template = PLAIN  # nothing ends a turn but the next one's header
    assert texts_learnt(Chat(tokenizer), talk("q", "yes", "q", "no")) == ["yes\n\n", "no"]


def test_a_turn_without_text_is_not_learnt(tokenizer):
    chat = Chat(tokenizer)
    assert texts_learnt(chat, talk("q", "", "q", "no")) == ["no<|im_end|>"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + (m.content or '') + '<|im_end|>' }}{% endfor %}"
    )
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    conversation = [*talk("q"), *calls, {"role": "tool", "content": "no"}, *talk("q", "no")[1:]]
    assert texts_learnt(Chat(tokenizer), conversation) == ["no<|im_end|>"]


ANSWERS = [  # in a template that thinks; what is learnt of the last turn, and of an earlier one
    ("four", "four<|im_end|>", "four<|im_end|>"),  # the empty thinking block is the template's
    ("<think>\nit is 4\n</think>\n\n4", "<think>\nit is 4\n</think>\n\n4<|im_end|>", "4<|im_end|>"),
    ("<think>is it 4?</think>4", "is it 4?\n</think>\n\n4<|im_end|>", "4<|im_end|>"),  # 4 is in the thinking too
    ("\nfour \n", "four \n<|im_end|>", "\n\nfour \n<|im_end|>"),  # one token with the header's newline
    ("<think></think>4", "4<|im_end|>", "4<|im_end|>"),
]


@pytest.mark.parametrize(("answer", "last", "earlier"), ANSWERS)
def test_thinking(answer, last, earlier, tokenizer):
    tokenizer.chat_template = THINKING
    chat = Chat(tokenizer)
    assert texts_learnt(chat, talk("2+2?", answer)) == [last]
    # Of an earlier turn the template drops the thinking.
    assert texts_learnt(chat, talk("2+2?", answer, "4", "sure")) == [earlier, "sure<|im_end|>"]


def test_thinking_is_that_of_qwen3(public_file, tokenizer):
    """Its published template and vocabulary, on the same answers."""
    qwen3 = Chat(load_tokenizer(public_file("tokenizers/qwen-derived")))
    for answer, last, earlier in ANSWERS:
        conversation = talk("2+2?", answer, "2+2?", answer, system="be brief")
        shown = qwen3.tokenizer.apply_chat_template(conversation, tokenize=False)
        assert tokenizer.apply_chat_template(conversation, chat_template=THINKING, tokenize=False) == shown
        assert texts_learnt(qwen3, conversation) == [earlier, last]


def test_a_response_that_was_cut_does_not_learn_to_end_there(tokenizer):
    conversation = talk("q", "one two three four five six seven eight nine ten")
    whole = len(Chat(tokenizer).encode([Chat(tokenizer).render(conversation)])[0])
    chat = Chat(tokenizer, max_length=whole - 5, over_long="truncate_response")
    (text,) = texts_learnt(chat, conversation)
    assert text.startswith("one two") and "<|im_end|>" not in text
    long = talk("an old question " * 9, "old", "q", "new")
    chat = Chat(tokenizer, max_length=30, over_long="truncate_prompt")
    assert texts_learnt(chat, long) == ["new<|im_end|>"]


def test_offsets_that_leave_out_white_space(tokenizer):
    conversation = talk("q", "a  plant \n tree", "user", " yes")
    expected = texts_learnt(Chat(tokenizer), conversation)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    offsets = tokenizer("a yes", return_offsets_mapping=True)["offset_mapping"]
    assert offsets[0][1] < offsets[1][0]  # they do leave it out
    assert texts_learnt(Chat(tokenizer), conversation) == expected


def test_verdicts_within_an_answer(tokenizer):
    chat = Chat(tokenizer)
    for answer, verdict in (
        ("It is 3 of 5. <score>3</score>", "3"),
        ("A, not B: <better>tie</better>", "tie"),
        ("A", ""),
    ):
        said = texts_learnt(chat, talk("Rate it", answer), field="verdict")
        assert len(said) == bool(verdict) and all(verdict in run and len(run) <= len(verdict) + 2 for run in said)


def test_parts_of_a_text_are_found_where_the_template_changed_it(tokenizer):
    tokenizer.chat_template = STRIPPING
    chat = Chat(tokenizer)
    conversation = talk("tree", "\n a tree is a plant \n")
    start = conversation[-1]["content"].index("tree")
    made = chat.groups([Example((tuple(conversation),), spans={"x": ((Span(-1, start, start + 4, 2.0),),)})])[0]
    (at,) = np.flatnonzero(made.labels["x"])
    assert chat.tokenizer.decode(made.tree.tokens[at + 1]).strip() == "tree" and made.labels["x"][at] == 2
    assert chat.tokenizer.decode(made.tree.tokens[at]).strip() == "a"


def test_a_text_that_the_template_changes_is_not_found():
    render = lambda conversation: "".join(m["content"].upper() for m in conversation)
    conversation = talk("q", "answer")
    assert places.locate(render, render(conversation), conversation, {1}) == [None, None]
    twice = lambda conversation: "".join(2 * m["content"] for m in conversation)
    assert places.locate(twice, twice(conversation), conversation, {1}) == [None, None]

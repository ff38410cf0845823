"""What templates do with tool calls, thoughts, system messages and tools; the reference is what transformers renders of
a conversation that is written as the template wants it."""

import json

import pytest
from small_tokenizers import CHATML, THINKING

from rmjax.batches import showing, token_cache
from rmjax.batches import template as template_lib
from rmjax.batches.chat import Chat
from rmjax.batches.tasks import Example, Preferences
from rmjax.data.records import BadRow, check_conversation, group, pair

# As Qwen2.5's: tools in the system message, arguments as JSON of what they are.
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{% if c.function is defined %}{% set c = c.function %}{% endif %}"
    """{{ '\n{"name": "' + c.name + '", "arguments": ' }}{{ c.arguments | tojson }}{{ '}' }}{% endfor %}"""
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
# As Qwen3's: arguments that are text stay as they are.
BOTH = QWEN.replace(
    "{{ c.arguments | tojson }}",
    "{% if c.arguments is string %}{{ c.arguments }}{% else %}{{ c.arguments | tojson }}{% endif %}",
)
# As Llama 3.0's: roles and texts, nothing else.
LLAMA = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
# As Gemma's: the same with names of its own, and no system messages.
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}{{ m['content'] | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
# As DeepSeek-R1's: an answer is what follows the thought; the arguments of calls are text.
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% if m.role == 'user' %}{{ '<|im_start|>user ' + m.content }}{% endif %}"
    "{% if m.role == 'assistant' and m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '<|im_start|>' + c.type + ' ' + c.function.name + '\n' + c.function.arguments + '<|im_end|>' }}{% endfor %}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant ' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
# As Llama 3.1's: a turn with calls shows nothing else.
CALLS_ALONE = LLAMA.replace(
    "{{ '<|im_start|>'", "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ '<|im_start|>'"
).replace("{% endfor %}", "{% endif %}{% endfor %}")

ASKED = {"role": "user", "content": "Weather in Paris?"}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


def call(arguments, content=None):
    function = {"name": "get_weather", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture
def chat(tokenizer):
    def make(template):
        tokenizer.chat_template = template
        return Chat(tokenizer)

    return make


def left_out(chat, *turns, tools=None):
    return [bad.reason for bad in chat.left_out(list(turns), tools)]


OBJECT, TEXT = {"city": "Paris", "unit": None}, '{"city":"Paris", "unit": null}'


@pytest.mark.parametrize(
    "template, given, wanted",
    [
        (QWEN, TEXT, OBJECT),
        (QWEN, OBJECT, OBJECT),
        (QWEN, "", {}),
        (QWEN, "not JSON", "not JSON"),
        (QWEN, "[1]", "[1]"),
        (BOTH, TEXT, TEXT),
        (BOTH, OBJECT, OBJECT),
        (DEEPSEEK, TEXT, TEXT),
        (DEEPSEEK, OBJECT, json.dumps(OBJECT)),
    ],
)
@pytest.mark.parametrize("content", [None, ""])
def test_arguments_are_objects_or_text_as_the_template_takes_them(chat, template, given, wanted, content):
    made = chat(template)
    expected = made.tokenizer.apply_chat_template([ASKED, call(wanted)], tokenize=False)
    assert "Paris" in expected or "Paris" not in str(wanted)
    assert made.render([ASKED, call(given, content)]) == expected
    without_content = {key: value for key, value in call(given).items() if key != "content"}
    assert made.render([ASKED, without_content]) == expected
    names = ["arguments_not_json"] if given in ("not JSON", "[1]") else []
    assert left_out(made, ASKED, call(given, content)) == names


def test_calls_without_a_function_around_them(chat):
    bare = said("", tool_calls=[{"name": "get_weather", "arguments": TEXT}])
    assert '"arguments": {"city": "Paris", "unit": null}' in chat(QWEN).render([ASKED, bare])


@pytest.mark.parametrize("template", [LLAMA, GEMMA, CHATML.replace("m.content", "(m.content or '')")])
def test_an_answer_that_the_template_does_not_show_is_no_answer(chat, template):
    made = chat(template)
    for lost in (call(TEXT), said("", reasoning_content="hm", tool_calls=call(OBJECT)["tool_calls"])):
        with pytest.raises(BadRow, match=r"it does not show .*tool_calls of the last assistant turn") as refused:
            made.render([ASKED, lost])
        assert refused.value.reason == "template_error"
    names = left_out(made, ASKED, call(TEXT, "I look."), tools=TOOLS)
    assert names == ["scored_tool_calls_left_out", "tools_left_out"]
    assert left_out(made, ASKED, call(TEXT, "I look."), ASKED, said("Rain.")) == ["tool_calls_left_out"]
    record = pair([ASKED, call(TEXT)], [ASKED, said("I do not know.")])
    good = pair([ASKED, said("Rain.")], [ASKED, said("I do not know.")])
    first, second = made.groups([Example(r.conversations) for r in (record, good)])
    assert isinstance(first, BadRow) and first.reason == "template_error" and not isinstance(second, BadRow)
    kept = group([[ASKED, said("")]], keep=True)  # an empty answer that is one, and is kept
    assert not isinstance(made.groups([Example(kept.conversations)], keep=True)[0], BadRow)


def test_a_text_beside_calls_that_the_template_drops(chat):
    with pytest.raises(BadRow, match="it does not show the last assistant turn's text"):
        chat(CALLS_ALONE).render([ASKED, call(OBJECT, "I look.")])
    assert "get_weather" in chat(CALLS_ALONE).render([ASKED, call(OBJECT)])


THOUGHT = "<think>\ntwo and two is four\n</think>\n\n4"


@pytest.mark.parametrize(
    "template, last, earlier",
    [
        (DEEPSEEK, ["scored_thought_left_out"], ["thought_left_out"]),
        (THINKING, [], ["thought_left_out"]),
        (CHATML, [], []),
    ],
)
def test_thoughts(chat, template, last, earlier):
    made = chat(template)
    assert left_out(made, ASKED, said(THOUGHT)) == last
    assert left_out(made, ASKED, said(THOUGHT), ASKED, said("4")) == earlier
    assert left_out(made, ASKED, said(THOUGHT.removeprefix("<think>\n"))) == last
    if last:  # a thought alone
        with pytest.raises(BadRow, match="it does not show the thought in the last assistant turn's text"):
            made.render([ASKED, said("<think>\nwithout an answer\n</think>")])
    else:
        made.render([ASKED, said("<think>\nwithout an answer\n</think>")])


def test_a_text_in_tags_keeps_them_for_the_template(chat):
    """Qwen3 keeps the thought of a call whose result comes as a user's turn in <tool_response>."""
    asks = (
        "m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>'))"
    )
    made = chat(THINKING.replace("m.role == 'user'", asks))
    result = {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"}
    assert left_out(made, ASKED, said(THOUGHT), result, said("4")) == []
    assert "two and two" in made.render([ASKED, said(THOUGHT), result, said("4")])


def test_everything_else_that_a_conversation_holds(chat):
    made = chat(
        "{% for m in messages if m.role != 'system' and m.content %}{{ m.role + m.content + eos_token }}{% endfor %}"
    )
    system, empty = {"role": "system", "content": "Be brief."}, {"role": "user", "content": " "}
    assert left_out(made, system, ASKED, said("4")) == ["system_left_out"]
    assert left_out(made, {**empty, "content": ""}, said("4")) == ["empty_turn_left_out"]
    assert left_out(made, ASKED, said("4"), tools=TOOLS) == ["tools_left_out"]
    assert left_out(made, ASKED, said("4", reasoning_content="hm")) == ["scored_reasoning_content_left_out"]
    assert left_out(made, ASKED, said("4", reasoning_content="hm"), ASKED, said("5")) == ["reasoning_content_left_out"]
    assert left_out(made, ASKED, said("4", weight=0, name="")) == ["scored_other_key_left_out"]
    assert left_out(made, {**ASKED, "images": ["a.png"], "id": "7"}, said("4")) == ["other_key_left_out"]
    assert left_out(made, ASKED, said("4", weight=None, tool_calls=[])) == []
    shows = chat("{% for m in messages %}{{ m.role + m.content ~ m.weight ~ (tools or '') }}{% endfor %}")
    assert left_out(shows, system, ASKED, said("4", weight=0), tools=TOOLS) == []
    tool = {"role": "tool", "content": "rain", "tool_call_id": "c1"}
    assert left_out(chat(DEEPSEEK), ASKED, call(TEXT), tool, said("4")) == ["text_left_out"]


def test_a_template_that_shows_no_answers_is_refused(chat):
    with pytest.raises(
        ValueError, match=r"cannot render a plain conversation: it does not show the last assistant turn"
    ):
        chat("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{{ eos_token }}{% endfor %}")


def test_texts_that_were_rendered_already(chat):
    made = chat(CHATML)
    prompt = {"role": "user", "content": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}
    assert left_out(made, prompt, said("yo<|im_end|>")) == ["special_tokens_in_text"] * 2
    assert left_out(made, {"role": "user", "content": "<|reserved_special_token_0|> <think>"}, said("yo")) == []


def test_conversations_of_one_shape_are_probed_once(chat, monkeypatch):
    made = chat(QWEN)
    rendered = []
    apply = made.tokenizer.apply_chat_template
    monkeypatch.setattr(made.tokenizer, "apply_chat_template", lambda *a, **k: rendered.append(a) or apply(*a, **k))
    for i in range(5):
        conversation = [{"role": "user", "content": f"question {i}"}, said(f"answer {i}", reasoning_content=str(i))]
        made.render(conversation)
        assert len(made.left_out(conversation)) == 1
    assert len(rendered) == 5 + 1


def test_the_audit_counts_what_the_template_takes_away(chat, tmp_path):
    rows = [
        {"prompt": [ASKED], "chosen": [said(THOUGHT)], "rejected": [said("<think>\na guess\n</think>\n\n5")]},
        {"prompt": [ASKED], "chosen": [said("4")], "rejected": [said("5<|im_end|>")]},
        {"prompt": [ASKED], "chosen": [call(OBJECT, "")], "rejected": [said("no")], "tools": TOOLS},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = chat(DEEPSEEK)
    audit = token_cache.build(str(path), made, Preferences(), on_bad_row="error", workers=0, cache_dir=tmp_path).audit
    assert {name: (count.rows, count.kept) for name, count in audit.reasons.items()} == {
        "scored_thought_left_out": (1, 1),
        "special_tokens_in_text": (1, 1),
        "tools_left_out": (1, 1),
    }
    assert audit.unusable() == 0
    assert audit.reasons["scored_thought_left_out"].example == (
        "pairs.jsonl:0: the thought in the last assistant turn's text"
    )
    record = group([check_conversation([ASKED, said(THOUGHT)])])
    assert "  scored_thought_left_out: the thought in the last assistant turn's text" in showing.rendering(made, record)


def test_long_texts_are_looked_at_in_time(chat):
    made = chat(CHATML)
    for text in (
        " " * 200_000 + "x",
        "<" * 200_000,
        "</a" * 70_000,
        "<a>" + "</a>x" * 50_000,
        "<think>" + "</b>" * 50_000,
    ):
        assert left_out(made, {"role": "user", "content": text}, said("4")) == []


@pytest.mark.parametrize("template", [CHATML, THINKING, LLAMA, DEEPSEEK])
def test_plain_conversations_lose_what_their_marked_ones_do(chat, template):
    made = chat(template)._template
    texts = ("yes", " ", "", "a < b", "<think>a</think>b", "a</think>", "<b>bold</b>")
    asked = [[ASKED], [{"role": "system", "content": "Be brief."}, ASKED], [{"role": "system", "content": " "}, ASKED]]
    conversations = [[*before, said(text)] for before in asked for text in texts]
    conversations += [[*before, said(text), ASKED, said("no")] for before in asked for text in texts]
    for conversation in conversations * 2:  # the second time they are remembered
        expected = made._not_shown(*template_lib._marked(conversation, None))
        assert made.not_shown(conversation) == expected, conversation

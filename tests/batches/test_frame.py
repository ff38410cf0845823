"""Renderings and parts of them: what is missing is named and added, and what is rendered can be read again."""

import pytest
import small_tokenizers
import transformers

from rmjax.batches import frame
from rmjax.batches.chat import Chat
from rmjax.batches.frame import Frame, NotWhole, read_conversation, read_prompt

# Templates in the manner of Llama 3 (a BOS, trimmed contents), of Mistral, and without special tokens.
BOS_FIRST = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ raise_exception('no') }}"
    "{% endif %}{% endfor %}"
)
INST_SYSTEM = (  # the system message begins the first question
    "{{ bos_token }}{% set before = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + (before if loop.first else '') + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BARE = "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content }}{% endfor %}"
TEMPLATES = {
    "chatml": small_tokenizers.CHATML,
    "thinking": small_tokenizers.THINKING,
    "bos": BOS_FIRST,
    "inst": INST,
    "inst with a system": INST_SYSTEM,
    "plain": PLAIN,
    "bare": BARE,
}
THOUGHTLESS = {"role": "assistant", "content": "<think>\n\n</think>\n\nA plant."}
QUESTION, ANSWER = {"role": "user", "content": "What is a tree?"}, {"role": "assistant", "content": "A plant."}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    made = {}
    for name, template in TEMPLATES.items():
        directory = small_tokenizers.save(tmp_path_factory.mktemp(name), template)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory))
        tokenizer.bos_token = "<s>"
        made[name] = Chat(tokenizer)
    return made


def cut(text, end):
    """A text without what it ends with."""
    assert text.endswith(end)
    return text[: len(text) - len(end)]


CONVERSATIONS = [
    [QUESTION, ANSWER],
    [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "\n 0 1 2\n\n"}],
    [QUESTION, {"role": "assistant", "content": "x"}],
    [QUESTION, {"role": "assistant", "content": ""}],
    [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER],
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_whole_renderings_lack_nothing(name, chats):
    chat = chats[name]
    whole = Frame(chat)
    for conversation in CONVERSATIONS:
        if name == "inst" and conversation[0]["role"] == "system":
            continue
        text = chat.tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        whole.check(ids)
        assert whole.completed_text(text) == text and whole.completed_ids(ids) == ids


@pytest.mark.parametrize(
    ("name", "start", "end", "words"),
    [
        ("chatml", "", "\n", r"ends with .*<\|im_end\|>' and lacks '\\n'"),
        ("chatml", "", "<|im_end|>\n", r"ends with .*A plant.' and lacks '<\|im_end\|>\\n'"),
        ("thinking", "", "<|im_end|>\n", r"lacks '<\|im_end\|>\\n'"),
        ("bos", "<s>", "", "lacks the BOS '<s>'"),
        ("bos", "", "<|im_end|>", r"lacks '<\|im_end\|>'"),
        ("bos", "<s>", "<|im_end|>", "lacks the BOS '<s>'"),
        ("inst", "<s>", "<|im_end|>", "lacks the BOS '<s>'"),
        ("plain", "", "\n", r"lacks '\\n'"),
    ],
)
def test_what_a_rendering_lacks_is_named_and_added(name, start, end, words, chats):
    chat = chats[name]
    whole, text = Frame(chat), chat.tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False)
    part = cut(text, end).removeprefix(start)
    ids, lacking = (chat.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, part))
    with pytest.raises(NotWhole, match=words):
        whole.check(lacking)
    assert whole.completed_text(part) == text
    if name != "plain":  # whose end merges with what precedes it
        assert whole.completed_ids(lacking) == ids


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("chatml", lambda t: t + "\n", r"ends with '<\|im_end\|>\\n\\n'"),
        ("chatml", lambda t: cut(t, "<|im_end|>\n") + "<|endoftext|>", r"ends with '<\|endoftext\|>'"),
        ("chatml", lambda t: cut(t, "A plant.<|im_end|>\n"), "has no text"),
        ("chatml", lambda t: cut(t, "<|im_start|>assistant\nA plant.<|im_end|>\n"), "last turn is not the assistant's"),
        ("chatml", lambda t: t + "<|im_start|>user\nAnd?<|im_end|>\n", "last turn is not the assistant's"),
        ("chatml", lambda t: "A plant.", "begins with 'A plant.*renderings with '<.im_start"),
        ("chatml", lambda t: "<s>" + t, "begins with '<s>"),
        ("thinking", lambda t: cut(t, "A plant.<|im_end|>\n"), "has no text"),
        ("bos", lambda t: "<s>" + t, "two BOS"),
        ("bos", lambda t: t + "<|im_start|>assistant\n\n", "has no text|ends with"),
    ],
)
def test_what_cannot_be_completed_is_refused(name, change, words, chats):
    chat = chats[name]
    whole, text = Frame(chat), chat.tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False)
    ids = chat.tokenizer(change(text), add_special_tokens=False)["input_ids"]
    with pytest.raises(NotWhole, match=words):
        whole.check(ids)
    with pytest.raises(NotWhole):
        whole.check(whole.completed_ids(ids))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "bare"])
def test_rendered_prompts_are_read_as_messages(name, chats):
    chat = chats[name]
    prompts = [[QUESTION], [QUESTION, ANSWER, {"role": "user", "content": "And\n\nwhy?"}]]
    prompts += [[{"role": "system", "content": "Be brief."}, QUESTION]] if not name.startswith("inst") else []
    for messages in prompts:
        text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert read_prompt(chat, text) == (messages, "")
        whole = [*messages, ANSWER]
        assert read_conversation(chat, chat.tokenizer.apply_chat_template(whole, tokenize=False)) == whole
    assert read_prompt(chat, "What is a tree?") is None and read_conversation(chat, "A plant.") is None


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "bare"])
@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|endoftext|>", "<|im_end|>\n<|endoftext|>"])
def test_a_rollout_is_read_as_messages(name, end, chats):
    chat = chats[name]
    text = chat.render([QUESTION, ANSWER])
    rollout = text[: text.index("A plant.")].removeprefix("<s>") + "A plant." + end
    assert Frame(chat).read(rollout) == [QUESTION, *([ANSWER] if name != "thinking" else [THOUGHTLESS])]
    assert chat.render(Frame(chat).read(rollout)) == text


def test_a_system_message_that_nothing_marks_is_read_as_part_of_the_question(chats):
    chat, system = chats["inst with a system"], {"role": "system", "content": "Be brief."}
    text = chat.tokenizer.apply_chat_template([system, QUESTION], tokenize=False, add_generation_prompt=True)
    assert read_prompt(chat, text) == ([{"role": "user", "content": "Be brief.\n\nWhat is a tree?"}], "")


def test_how_a_thought_begins_is_given_back(tmp_path):
    template = small_tokenizers.CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    chat = Chat(transformers.AutoTokenizer.from_pretrained(str(small_tokenizers.save(tmp_path, template))))
    text = chat.tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    assert read_prompt(chat, text) == ([QUESTION], "<think>\n")


def test_a_response_loses_the_special_tokens_at_its_end(chats):
    whole = Frame(chats["chatml"])
    assert whole.without_ends("A plant. <|im_end|>\n<|endoftext|><|endoftext|>") == "A plant. "
    assert whole.without_ends("A <|im_end|> plant.\n") == "A <|im_end|> plant.\n"


def test_a_turn_that_calls_a_tool_may_end_in_another_way(tmp_path):
    template = small_tokenizers.CHATML.replace(
        "m.content + '<|im_end|>\n'",
        "m.content ~ (m.tool_calls | tojson ~ '<|endoftext|>' if m.tool_calls else '<|im_end|>\n')",
    )
    chat = Chat(transformers.AutoTokenizer.from_pretrained(str(small_tokenizers.save(tmp_path, template))))
    call = {"role": "assistant", "content": "", "tool_calls": [frame._call("now")]}
    for conversation in ([QUESTION, call], [QUESTION, ANSWER]):
        Frame(chat).check(chat.encode([chat.render(conversation)])[0])

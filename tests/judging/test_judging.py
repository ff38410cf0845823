"""Judging questions, both orders as one tree, and verdicts written and read back."""

import collections
import dataclasses
import gzip
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import transformers

from rmjax.batches import rendering
from rmjax.batches.chat import Chat
from rmjax.batches.trees import build_tree
from rmjax.data import formats
from rmjax.data.records import BadRow, Record, pair
from rmjax.judging import verdicts
from rmjax.judging.verdicts import Judgements, Verdict, opens_thought, parse_verdict
from rmjax.objectives.grpo import GRPO

SMALL = "{{ prompt }}|{{ response_a }}|{{ response_b }}"


def turn(content, role="assistant", **more):
    return {"role": role, "content": content, **more}


def make_pair(first="yes", second="no", prompt="Is it?", **kwargs):
    return pair([turn(prompt, "user"), turn(first)], [turn(prompt, "user"), turn(second)], **kwargs)


def make_record(texts, **kwargs):
    """A record of one prompt; the matrices that are not given say nothing."""
    nothing = {name: np.zeros((len(texts), len(texts)), np.float32) for name in ("wins", "ties", "margin")}
    return Record(tuple((turn("Is it?", "user"), turn(text)) for text in texts), **{**nothing, **kwargs})


def matrix(k, **cells):
    """A [k, k] matrix from cells like _01=1."""
    x = np.zeros((k, k), np.float32)
    for name, value in cells.items():
        x[int(name[1]), int(name[2])] = value
    return x


def read(conversation):
    return [message["content"] for message in conversation]


# ---- templates ----


@pytest.mark.parametrize(("default", "kind"), verdicts.DEFAULTS.items())
def test_packaged_templates_can_be_used(default, kind):
    text = verdicts.load_template("", default)
    verdicts.check_template(text, kind, default)
    assert (
        "\n\n\n" not in verdicts.ask(text, kind, [turn("q", "user")], ["x", "y"], **verdicts.CASES[kind][0])["content"]
    )


def test_packaged_pairwise_question_as_it_is_read():
    (message,), _ = Judgements(verdicts.load_template("", "pairwise")).questions(
        [turn("Be brief.", "system"), turn("Is it?", "user"), turn("yes")],
        [turn("Be brief.", "system"), turn("Is it?", "user"), turn("no")],
    )
    assert message["role"] == "user"
    assert message["content"].endswith(
        "[Conversation]\nSystem: Be brief.\n\nUser: Is it?\n\n[Response A]\nyes\n\n[Response B]\nno\n\n"
        "[Question]\nWhich response is better, A or B, or is it a tie?"
    )
    two = Judgements(verdicts.load_template("", "pairwise"), classes=2)
    assert "tie" not in two.examples(make_pair())[0].conversations[0][0]["content"]


def test_a_principle_stands_in_every_packaged_question_once_and_before_what_is_judged():
    history = [turn("Is it?", "user", principle="Be brief.\nBe true.")]
    for default, kind in verdicts.DEFAULTS.items():
        for name in ("",) if default == "pairwise" else ("", "reasons"):
            text = verdicts.load_template(name, default)
            for more in verdicts.CASES[kind]:
                shown = ["first", "second"][: len(verdicts.SHOWN[kind])]
                asked = verdicts.ask(text, kind, history, shown, **more)["content"]
                assert asked.count("\n\n[Principle]\nBe brief.\nBe true.\n\n[Response") == 1 and "\n\n\n" not in asked
                without = verdicts.ask(text, kind, [turn("Is it?", "user")], shown, **more)["content"]
                assert "rinciple]" not in without and "\n\n\n" not in without


def test_questions_that_ask_for_reasons_end_with_a_verdict_that_is_read():
    history = [turn("Is it?", "user")]
    pair_text, score_text = (verdicts.load_template("reasons", name) for name in ("judge_pair", "judge_score"))
    asked = verdicts.ask(pair_text, "pair", history, ["x", "y"], ties=True)["content"]
    assert "First name the principles" in asked and asked.endswith("<better>B</better> or <better>tie</better>.")
    more = {"attributes": ["truth", "style"], "scale": ("0", "4")}
    lines = verdicts.ask(score_text, "score", history, ["x"], **more)["content"].splitlines()
    assert lines[-2:] == ["<truth>0</truth>", "<style>0</style>"]
    one = verdicts.ask(score_text, "score", history, ["x"], **{**more, "attributes": ["truth"]})["content"]
    assert one.splitlines()[-1] == "<score>0</score>" and "on truth" in one
    with pytest.raises(FileNotFoundError, match="no judging template reasons"):
        verdicts.load_template("reasons", "pairwise")


def test_the_rubric_of_a_row_is_in_what_a_judge_is_asked_for_reinforcement():
    row = {"prompt": "Is it?", "rubric": ["Be brief.", "Be true."], "chosen": "yes", "rejected": "no"}
    (record,) = formats.detect([row], "auto", "").read(row, source="here", where="f:0")
    for template in ("", "reasons"):
        task = GRPO(target="pair", template=template).task
        (example,) = task.examples(record)
        for (question,) in example.conversations:
            assert "[Principle]\nBe brief.\nBe true.\n" in question["content"]
            assert ("First say what the principle asks for" in question["content"]) == (template == "reasons")


def test_a_principle_that_a_question_would_not_show_is_refused():
    asked = [turn("Is it?", "user"), turn("yes"), turn("Sure?", "user")]
    record = pair([*asked, turn("yes")], [*asked, turn("no")], principle="Be brief.")
    (example,) = Judgements(SMALL + "|{{ principle }}").examples(record)
    assert read(c for (c,) in example.conversations) == ["Sure?|yes|no|Be brief.", "Sure?|no|yes|Be brief."]
    with pytest.raises(BadRow, match=r"not_read: .*'Be brief\.'.*\{\{ principle"):
        Judgements(SMALL).examples(record)
    may_look_there = SMALL + "{% for m in messages %}{{ m.principle | default() }}{% endfor %}"
    Judgements(may_look_there).examples(record)
    first, second = ([turn(text, "user"), turn("yes")] for text in ("Is it?", "Was it?"))
    with pytest.raises(BadRow, match="not_read: the principle belongs to a turn in which"):
        Judgements(verdicts.load_template("", "pairwise")).examples(pair(first, second, principle="Be brief."))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ response_a }} {{ response_b", r"mine\.jinja, line 1: .*expected a Jinja2 template"),
        ("{{ response_a | shout }}\n{{ response_b }}", r"mine\.jinja, line 1: No filter named 'shout'"),
        ("{{ response_a }}{{ response_b }}{{ question }}{{ answer }}", r"mine\.jinja uses answer, question, which"),
        ("{{ prompt }} {{ response_a }}", r"mine\.jinja does not show response_b,"),
        ("{% if false %}{{ response_a }}{{ response_b }}{% endif %}", "does not show response_a and response_b"),
        ("{{ response_a }}{% if ties %}{{ response_b }}{% endif %}", "does not show response_b"),
        ("{{ response_a[:0] }}{{ response_b }}", "does not show response_a"),
        ("{{ messages[7].content }}{{ response_a }}{{ response_b }}", "cannot be rendered: UndefinedError"),
        ("{{ response_a.__class__.__mro__ }}{{ response_a }}{{ response_b }}", "cannot be rendered: SecurityError"),
        ("{% include 'x' %}{{ response_a }}{{ response_b }}", "cannot be rendered"),
        ("{{ 1 / 0 }}{{ response_a }}{{ response_b }}", "cannot be rendered: ZeroDivisionError"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_with_their_name(text, said, tmp_path):
    (tmp_path / "mine.jinja").write_text(text)
    with pytest.raises(ValueError, match=said):
        verdicts.load_template(str(tmp_path / "mine.jinja"), "pairwise")
    with pytest.raises(ValueError):
        Judgements(text)


def test_a_template_is_a_file_or_a_text(tmp_path):
    (tmp_path / "mine.jinja").write_text(SMALL + "\n")
    assert verdicts.load_template(str(tmp_path / "mine.jinja"), "pairwise") == SMALL + "\n"
    assert verdicts.load_template(SMALL, "pairwise") == SMALL
    with pytest.raises(FileNotFoundError, match="no judging template"):
        verdicts.load_template(str(tmp_path / "other.jinja"), "pairwise")
    with pytest.raises(ValueError, match="the judging template does not show response,"):
        verdicts.load_template("{{ prompt }}", "judge_score")


def test_a_template_that_fails_on_a_row_makes_it_a_bad_row():
    task = Judgements("{{ response_a }}{{ response_b }}{% if messages | length > 1 %}{{ messages[9].x }}{% endif %}")
    task.examples(make_pair())
    history = [turn("a", "user"), turn("b"), turn("c", "user")]
    with pytest.raises(BadRow, match="template_error: the judging template: UndefinedError"):
        task.examples(pair([*history, turn("yes")], [*history, turn("no")]))


def test_a_template_that_loops_or_calls_itself_is_refused(monkeypatch):
    monkeypatch.setattr(rendering, "MOST_SECONDS", 0.5)
    shows = "{{ response_a }}{{ response_b }}"
    for text, why in (
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "TooSlow: it is not done"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'x' * 10**15 }}", "MemoryError"),
    ):
        with pytest.raises(ValueError, match=f"the judging template cannot be rendered: {why}"):
            verdicts.check_template(shows + text, "pair")


def test_what_a_template_is_told():
    text = "{{ prompt }}|{{ conversation }}|{{ messages | map(attribute='role') | join('+') }}|{{ ties }}|"
    history = [turn("S", "system"), turn("one", "user"), turn("two"), turn("three", "user")]
    conversations = [[*history, turn(x)] for x in ("yes", "no")]
    (first,), (second,) = Judgements(text + "{{ response_a }}/{{ response_b }}").questions(*conversations)
    said = "three|System: S\n\nUser: one\n\nAssistant: two\n\nUser: three|system+user+assistant+user|True|"
    assert first["content"] == said + "yes/no" and second["content"] == said + "no/yes"


def test_a_response_is_no_template():
    (message,), _ = Judgements(SMALL).questions([turn("{{ 7 * 7 }}")], [turn("{% if")])
    assert message["content"] == "|{{ 7 * 7 }}|{% if"


# ---- histories ----


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("ua", "uA", (1, "a", "A")),
        ("a", "A", (0, "a", "A")),  # no history at all
        ("uaub", "uAuB", (1, "Assistant: a\n\nUser: u\n\nAssistant: b", "Assistant: A\n\nUser: u\n\nAssistant: B")),
        ("ua", "uaub", (1, "a", "Assistant: a\n\nUser: u\n\nAssistant: b")),  # one goes on where the other ends
        ("uaub", "uauB", (3, "b", "B")),
    ],
)
def test_the_history_is_what_both_begin_with(first, second, expected):
    make = lambda letters: [turn(c, "user" if c == "u" else "assistant") for c in letters]
    history, *texts = verdicts.divide(make(first), make(second))
    assert (len(history), *texts) == expected and history == make(first)[: len(history)]


def test_tool_calls_are_shown():
    call = [{"function": {"name": "look", "arguments": {"x": "é"}}}]
    assert verdicts.text_of(turn(None, tool_calls=call)) == json.dumps(call, ensure_ascii=False)
    assert verdicts.text_of(turn("Wait.", tool_calls=call)).startswith("Wait.\n[{")


# ---- the task ----


@pytest.mark.parametrize(
    ("wins", "ties", "three", "skip", "half"),
    [
        ({"_01": 1}, {}, [1, 0, 0], [1, 0], [1, 0]),
        ({"_10": 1}, {}, [0, 1, 0], [0, 1], [0, 1]),
        ({"_01": 0.7, "_10": 0.3}, {}, [0.7, 0.3, 0], [0.7, 0.3], [0.7, 0.3]),
        ({}, {"_01": 1, "_10": 1}, [0, 0, 1], None, [0.5, 0.5]),
        ({"_01": 2, "_10": 1}, {"_01": 1, "_10": 1}, [0.5, 0.25, 0.25], [2 / 3, 1 / 3], [0.625, 0.375]),
    ],
)
def test_verdicts_of_both_orders(wins, ties, three, skip, half):
    record = make_record(["yes", "no"], wins=matrix(2, **wins), ties=matrix(2, **ties))
    for task, expected in (
        (Judgements(SMALL), three),
        (Judgements(SMALL, 2, "skip"), skip),
        (Judgements(SMALL, 2, "half"), half),
    ):
        if expected is None:
            with pytest.raises(BadRow, match="tie: neither response is preferred"):
                task.examples(record)
            continue
        (example,) = task.examples(record)
        assert [read(c) for c in example.conversations] == [["Is it?|yes|no"], ["Is it?|no|yes"]]
        swapped = [expected[1], expected[0], *expected[2:]]
        np.testing.assert_allclose(example.labels["verdict"], [expected, swapped], rtol=1e-6)
        assert example.labels["verdict"].dtype == np.float32 and example.name == ""
        assert example.labels["verdict"].shape == (2, *task.fields["verdict"][2:])


def test_each_labelled_pair_of_a_ranking_is_a_group():
    wins, ties, margin = matrix(3, _02=1), matrix(3, _12=1, _21=1), matrix(3, _02=2.5)
    record = make_record(["x", "y", "z"], wins=wins, ties=ties, margin=margin)
    examples = Judgements(SMALL).examples(record)
    assert [e.name for e in examples] == ["0-2", "1-2"]
    assert [read(e.conversations[0]) for e in examples] == [["Is it?|x|z"], ["Is it?|y|z"]]
    assert [e.labels["verdict"].tolist() for e in examples] == [[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 1]]]
    np.testing.assert_array_equal([e.labels["strength"] for e in examples], [[2.5], [np.nan]])  # one is a tie
    (decided, tied) = Judgements(SMALL, 2).examples(record)
    assert decided.name == "0-2" and tied.reason == "tie"  # counted, and the rest of the record is used


def test_swapping_a_records_responses_swaps_its_orders():
    record = make_pair(preference=0.8, margin=3.0)
    (one,), (other,) = (Judgements(SMALL).examples(r) for r in (record, record.select([1, 0])))
    assert other.conversations == one.conversations[::-1]
    np.testing.assert_array_equal(other.labels["verdict"], one.labels["verdict"][::-1])
    np.testing.assert_array_equal(other.labels["strength"], one.labels["strength"])


def test_records_that_a_judge_cannot_learn_from():
    with pytest.raises(BadRow, match="no_label: expected preferences, the row has no label"):
        Judgements(SMALL).examples(make_record(["x", "y"]))
    record = make_pair()
    hidden = tuple((*c[:-1], {**c[-1], "content": "same", "reasoning": c[-1]["content"]}) for c in record.conversations)
    with pytest.raises(BadRow, match="identical_responses"):
        Judgements(SMALL).examples(dataclasses.replace(record, conversations=hidden))
    for wrong in ({"classes": 4}, {"ties": "keep"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Judgements(SMALL, **wrong)


def test_both_orders_are_one_tree_that_shares_the_question(tokenizer):
    prompt = "What is a tree? A graph without cycles is a tree too. " * 4
    task = Judgements(verdicts.load_template("", "pairwise"))
    (example,) = task.examples(make_pair("a plant", "a graph", prompt))
    chat = Chat(tokenizer)
    (made,) = chat.groups([example])
    sequences = chat.encode([chat.render(c) for c in example.conversations])
    shared = next(i for i, (a, b) in enumerate(zip(*sequences)) if a != b)
    assert tokenizer.decode(sequences[0][:shared]).endswith("[Response A]\na")
    # A node ends one token before the sequences differ, so that token is there twice.
    assert len(made.tree) == sum(map(len, sequences)) - (shared - 1)
    assert made.tree.end.tolist() == build_tree(sequences).end.tolist() and made.tree.end_slot.tolist() == [0, 1]
    assert [s.tolist() for s in made.tree.sequences()] == sequences  # each order as it would be read alone
    np.testing.assert_array_equal(made.labels["verdict"], example.labels["verdict"])


def test_a_question_is_never_cut(tokenizer):
    (example,) = Judgements(SMALL).examples(make_pair("a plant " * 50, "a graph " * 50))
    for over_long in ("drop", "truncate_prompt", "truncate_response"):
        (made,) = Chat(tokenizer, max_length=40, over_long=over_long).groups([example])
        assert isinstance(made, BadRow) and made.reason == "over_long"


def test_the_task_is_a_value():
    task = Judgements(SMALL, 2, "half")
    assert pickle.loads(pickle.dumps(task)) == task and SMALL in repr(task)  # so that the cache's fingerprint has it
    code = "import sys, rmjax.judging.verdicts; print({'jax', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_votes_as_verdicts(small_sets, thinking_dir):
    rows = json.loads((small_sets / "votes.json").read_text())
    texts = lambda row: (row["response1"], row["response2"])
    rows = [row for row in rows if all(isinstance(x, str) and x.strip() for x in texts(row))]
    rows = [row for row in rows if row["response1"] != row["response2"]]
    majority, expected = collections.Counter(), collections.Counter()
    task = Judgements(verdicts.load_template("", "pairwise"))
    examples = []
    for row in rows:
        votes = [row[f"annotator{i}"] for i in (1, 2, 3)]
        tie = matrix(2, _01=votes.count(0), _10=votes.count(0))
        record = make_record(texts(row), wins=matrix(2, _01=votes.count(1), _10=votes.count(2)), ties=tie)
        (example,) = task.examples(record)
        examples.append(example)
        np.testing.assert_allclose(example.labels["verdict"][0], [votes.count(i) / 3 for i in (1, 2, 0)], rtol=1e-6)
        majority["AB "[int(example.labels["verdict"][0].argmax())]] += 1
        expected[{1: "A", 2: "B", 0: " "}[max((1, 2, 0), key=votes.count)]] += 1
    assert majority == expected and len(rows) > 100
    chat = Chat(transformers.AutoTokenizer.from_pretrained(str(thinking_dir)))
    for example, made in zip(examples[:50], chat.groups(examples[:50])):
        ids = chat.encode([chat.render(c) for c in example.conversations])
        assert [s.tolist() for s in made.tree.sequences()] == ids


# ---- verdicts ----

GOOD = [
    ("<score>3</score>", 3.0, "3"),
    ("Good, so <score>4.5</score>.", 4.5, "4.5"),
    ("<SCORE>\n 2 \n</Score >", 2.0, "2"),
    ("< score>-1</ score>", -1.0, "-1"),
    ("<score>+2</score>", 2.0, "+2"),
    ("<score>007</score>", 7.0, "007"),
    ("<score>3</score> again <score>3.0</score>", 3.0, "3.0"),  # repeated, not contradicted
    ("<think><score>1</score></think><score>5</score>", 5.0, "5"),
    ("<score>1</score> hm </think> <score>5</score>", 5.0, "5"),  # the block was opened in the prompt
    ("<think>a <think>b</think> <score>1</score></think><score>5</score>", 5.0, "5"),
    ("<score>5</score><think>or <score>1</score>?</think>", 5.0, "5"),
    ("<score>5</score><think>or <score>1</score>?", 5.0, "5"),
    ("<Thinking>x</THINKING><reasoning>y</reasoning><score>5</score>", 5.0, "5"),
    ("<scores>1</scores><score_>2</score_><score>5</score>", 5.0, "5"),
    ("日本語 🙂 <score>5</score>", 5.0, "5"),
]
BAD = [
    "",
    "3",
    "Score: 3",
    "<score>",
    "<score>3",
    "3</score>",
    "<score></score>",
    "<score>NaN</score>",
    "<score>inf</score>",
    "<score>1e1</score>",
    "<score>0x3</score>",
    "<score>1_0</score>",
    "<score>3/5</score>",
    "<score>3,5</score>",
    "<score>3.</score>",
    "<score>.5</score>",
    "<score>three</score>",
    "<score>３</score>",  # full width: a digit for Python, not for us
    "<score>3 4</score>",
    "<score>- 3</score>",
    "<score>--3</score>",
    "<score>" + "9" * 400 + "</score>",
    "<score>3</score><score>4</score>",
    "<score>3</score><score>x</score>",
    "<score>3</score><score>",
    "<score><score>3</score></score>",
    "<score>3<b>!</b></score>",
    "<score>3</scores>",
    "</score>3<score>",
    "<score value=3>",
    "<think><score>3</score></think>",
    "<think><score>3</score>",
    "<score>3<think>no, 4</think></score",
    "&lt;score&gt;3&lt;/score&gt;",
    "<better>A</better>",
]


@pytest.mark.parametrize(("text", "value", "inside"), GOOD)
def test_scores_that_can_be_read(text, value, inside):
    assert parse_verdict(text, "score") == Verdict("score", value)
    start, stop = parse_verdict(text, "score").span
    assert text[start:stop] == inside


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_score_is_never_one(text):
    verdict = parse_verdict(text, "score")
    assert verdict.kind == "unparseable" and isinstance(verdict.value, str) and verdict.value
    assert verdict.span is None


@pytest.mark.parametrize(
    ("value", "inside"), [("0", True), ("4", True), ("4.0001", False), ("-1", False), ("2.5", True)]
)
def test_scores_off_the_scale_are_no_scores(value, inside):
    kind = parse_verdict(f"<score>{value}</score>", "score", scale=(0, 4)).kind
    assert kind == ("score" if inside else "unparseable")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<better>A</better>", "A"),
        ("I prefer B. <better> b </better>", "B"),
        ("<BETTER>TIE</BETTER>", "tie"),
        ("<better>\n\tTie\n</better>", "tie"),
        ("<better>A or B</better>", None),
        ("<better>Response A</better>", None),
        ("<better>C</better>", None),
        ("<better></better>", None),
        ("<better>A</better> <better>B</better>", None),
        ("<better>A</better> <better>a</better>", "A"),
        ("A", None),
        ("<think><better>A</better></think> <better>B</better>", "B"),
        ("<score>3</score>", None),
    ],
)
def test_better(text, value):
    expected = "unparseable" if value is None else "better"
    verdict = parse_verdict(text, "better")
    assert verdict.kind == expected and (value is None or verdict.value == value)
    if value == "tie":
        assert parse_verdict(text, "better", ties=False).kind == "unparseable"


def test_verdicts_by_attribute():
    text = "<helpfulness>3</helpfulness>\n<truth.ful ness>1</truth.ful ness>"
    assert parse_verdict(text, "score", tag="helpfulness") == Verdict("score", 3.0)
    assert parse_verdict(text, "score", tag="truth.ful ness") == Verdict("score", 1.0)
    assert parse_verdict(text, "score", tag="truthxful ness").kind == "unparseable"
    assert text[slice(*parse_verdict(text, "score", tag="truth.ful ness").span)] == "1"
    with pytest.raises(ValueError, match="kind='best' is none of"):
        parse_verdict(text, "best")


CUT = "I lean to <better>A</better> but"  # cut off within a thought that the prompt opened


@pytest.mark.parametrize(
    ("text", "value"),
    [(CUT, None), (f"{CUT} no.</think> <better>B</better>", "B"), (f"{CUT}</think><think><better>B</better>", None)],
)
def test_a_thought_that_the_prompt_opened_holds_no_verdict(text, value):
    assert opens_thought("<|Assistant|><think>\n") and not opens_thought("<think>\n</think>\n")
    verdict = parse_verdict(text, "better", thinking=True)
    assert (verdict.value if verdict.kind == "better" else None) == value
    assert parse_verdict(CUT, "better").value == "A"


# Texts that other readers pay for: OpenJudge's read the first as a tie, the second as A, and scores where are none.
NONSENSE = [
    *(("PRIORITIES", "better"), ("neither is adequate", "better"), ("A", "better"), ("A is better than B", "better")),
    *(("<score>-1</score>", "score"), ("<score>10</score>", "score"), ("", "score"), ("4 out of 4", "score")),
    *(("<score>3.5/4</score>", "score"), ("<think><score>4</score>", "score"), ("<score></score>", "score")),
]


@pytest.mark.parametrize(("text", "kind"), NONSENSE)
def test_what_is_no_verdict_is_none(text, kind):
    assert parse_verdict(text, kind, scale=(0, 4)).kind == "unparseable"


def test_every_text_has_one_outcome():
    rng = np.random.default_rng(0)
    tags = [f"<{slash}{name}>" for name in ("score", "better", "think") for slash in ("", "/")]
    pieces = ["<score>3</score>", "<better>A</better>", *tags, "3", "A", "<", ">"]
    kinds = collections.Counter()
    for _ in range(3000):
        text = "".join(rng.choice(pieces, rng.integers(1, 9)))
        for kind in ("score", "better"):
            verdict = parse_verdict(text, kind)
            kinds[verdict.kind] += 1
            assert (verdict.kind == "unparseable") == (verdict.span is None)
            if verdict.span and kind == "score":
                assert float(text[slice(*verdict.span)]) == verdict.value
    assert all(kinds[kind] > 100 for kind in ("score", "better", "unparseable"))


def test_long_texts_are_read_in_a_moment():
    for piece in ("<score>", "<" + " " * 50, "<think>", "</think>", "<think></think>"):
        text = piece * 20_000 + "</think>" * 20_000 + "<score>3</score>"
        assert parse_verdict(text, "score").kind in ("score", "unparseable")


# ---- judges that write ----

SCORED = "{{ response }}|{{ attributes | join(',') }}|{{ scale | join('-') }}"


def test_scores_become_conversations():
    record = make_record(["x", "y"], attributes={"score": (3.0, 2.5)})
    made = verdicts.score_conversations(record, SCORED, scale=(0, 4))
    assert [read(c) for c in made] == [["x|score|0-4", "<score>3</score>"], ["y|score|0-4", "<score>2.5</score>"]]
    assert [m["role"] for m in made[0]] == ["user", "assistant"]


def test_several_attributes_are_rated_in_one_answer_and_missing_ones_leave_the_response_out():
    record = make_record(["x", "y"], attributes={"truth": (3.0, 2.0), "style": (1.0, math.nan)})
    made, unrated = verdicts.score_conversations(record, SCORED, scale=(0, 4))
    assert unrated.reason == "no_label"
    assert read(made) == ["x|truth,style|0-4", "<truth>3</truth>\n<style>1</style>"]
    first, second = verdicts.score_conversations(record, SCORED, scale=(0, 4), attributes=["truth"])
    assert read(first) == ["x|truth|0-4", "<score>3</score>"] and read(second)[1] == "<score>2</score>"
    with pytest.raises(BadRow, match="no_label: expected the attributes wit"):
        verdicts.score_conversations(record, SCORED, scale=(0, 4), attributes=["wit"])


def test_scores_that_could_not_be_read_back_are_refused():
    record = make_record(["x"], attributes={"score": (5.0,)})
    with pytest.raises(BadRow, match="out_of_scale"):
        verdicts.score_conversations(record, SCORED, scale=(0, 4))
    record = make_record(["x"], attributes={"truth": (5.0,), "Truth": (4.0,)})
    with pytest.raises(BadRow, match="contradicts itself"):
        verdicts.score_conversations(record, SCORED, scale=(0, 9))
    record = make_record(["x"], attributes={"think": (5.0,), "truth": (4.0,)})
    with pytest.raises(BadRow, match="conflicting_label"):
        verdicts.score_conversations(record, SCORED, scale=(0, 9))


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (2.5, "2.5"), (1 / 3, "0.3333"), (100, "100"), (-0.00001, "0"), (1e6, "1000000")]
)
def test_numbers_as_they_are_written(value, text):
    assert verdicts.number_text(value) == text


def test_preferences_become_conversations_in_both_orders():
    made = verdicts.better_conversations(make_pair(), SMALL, both_orders=True)
    assert [read(c) for c in made] == [["Is it?|yes|no", "<better>A</better>"], ["Is it?|no|yes", "<better>B</better>"]]
    tie = verdicts.better_conversations(make_pair(preference=0.5), SMALL, both_orders=True)
    assert [read(c)[1] for c in tie] == ["<better>tie</better>"] * 2
    with pytest.raises(BadRow, match="tie: no verdict has a majority"):
        verdicts.better_conversations(make_pair(preference=0.5), SMALL, ties=False)
    with pytest.raises(BadRow, match="no_label"):
        verdicts.better_conversations(make_record(["x", "y"]), SMALL)


def test_who_is_a_is_a_fair_coin_and_a_swapped_record_shows_the_other_order():
    swaps = 0
    for i in range(400):
        record = make_pair(f"yes {i}", f"no {i}")
        (one,), (other,) = (verdicts.better_conversations(r, SMALL) for r in (record, record.select([1, 0])))
        both = verdicts.better_conversations(record, SMALL, both_orders=True)
        assert one != other and one in both and other in both
        swaps += read(one)[1] == "<better>B</better>"
    assert 160 < swaps < 240  # 4 standard deviations around a fair coin


def test_majorities():
    wins, ties = matrix(3, _01=2, _10=1, _02=1, _20=1), matrix(3, _12=1, _21=1)
    made = verdicts.better_conversations(make_record(["x", "y", "z"], wins=wins, ties=ties), SMALL, both_orders=True)
    good = [read(c)[1][8:-9] for c in made if not isinstance(c, BadRow)]
    assert good == ["A", "B", "tie", "tie"] and sum(isinstance(c, BadRow) for c in made) == 1  # 0-2 is even


def test_ratings_are_written_and_read_back(small_sets):
    with gzip.open(small_sets / "judges.json.gz", "rt") as file:
        rows = json.load(file)
    template, counts, expected = verdicts.load_template("", "judge_score"), collections.Counter(), collections.Counter()
    for row in rows:
        for score, feedback in zip(row["gpt4_score"], row["gpt4_feedback"], strict=True):
            record = make_record([row["instruction"]], attributes={"score": (score,)})
            (made,) = verdicts.score_conversations(record, template, scale=(1, 5))
            answer = f"{feedback.rstrip()}\n\n{made[-1]['content']}"
            verdict = parse_verdict(answer, "score", scale=(1, 5))
            counts[verdict] += 1
            expected[Verdict("score", float(score))] += 1
            assert answer[slice(*verdict.span)] == str(score) and answer.startswith(feedback.rstrip())
    assert counts == expected and counts.total() == 72 and len(counts) == 5

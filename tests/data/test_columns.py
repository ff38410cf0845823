"""Columns under other names, and what of a row nobody reads: named once, or refused where it looks like more."""

import json

import pytest
from format_rows import NAMED, ROWS, SYSTEM, assistant, user

from rmjax.data import __main__ as data_command
from rmjax.data import formats, reading
from rmjax.data.formats import columns
from rmjax.data.ledger import Audit, rows_lines
from rmjax.data.records import BadRow

TEXTS = {"chosen": "yes", "rejected": "no"}
LAST = {"chosen": [assistant("yes")], "rejected": [assistant("no")]}
WHOLE = {"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}
EARLIER = [user("a"), assistant("b")]


def read(row, name="auto", columns="", rows=None):
    return formats.detect(rows or [row], name, columns).read(row, source="here", where="f:0")[0]


def prompt(row, **kwargs):
    """The turns before the answer, which are the same for both, or the reason why the row is bad."""
    try:
        first, second = read(row, **kwargs).conversations
    except BadRow as bad:
        return bad.reason
    assert first[:-1] == second[:-1] and [first[-1]["content"], second[-1]["content"]] == ["yes", "no"]
    return list(first[:-1])


# ----------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["principle", "Rubric", "criteria", "rubrics"])
@pytest.mark.parametrize("cell", ["Be brief.\nBe true.", ["Be brief.", "Be true."]])
def test_a_principle_is_a_key_of_the_first_user_turn(name, cell):
    asked = {**user("q"), "principle": "Be brief.\nBe true."}
    assert prompt({name: cell, "prompt": "q", **TEXTS}) == [asked]
    assert prompt({name: cell, **WHOLE}) == [asked]
    earlier = [SYSTEM, *EARLIER, user("q")]
    assert prompt({name: cell, "prompt": earlier, **TEXTS}) == [
        SYSTEM, {**user("a"), "principle": asked["principle"]}, *earlier[2:]
    ]  # fmt: skip
    assert prompt({name: " ", "prompt": "q", **TEXTS}) == [user("q")]
    wrong, good = ({name: x, "prompt": "q", **TEXTS} for x in ([{"points": 3}], cell))
    assert prompt(wrong, rows=[good, wrong]) == "wrong_type"
    with pytest.raises(ValueError, match=r"'principle' is wrong throughout: text or a list of texts.*ignore=NAME"):
        prompt(wrong)
    assert prompt({name: cell, "prompt": "q", **TEXTS}, columns=f"ignore={name}") == [user("q")]
    rated = {name: cell, "prompt": "q", "response": "a", "score": 3}
    assert read(rated).conversations == ((asked, assistant("a")),)


NAMES = ("prompt", "context", "history", "messages", "trajectory", "user", "question", "Question", "instruction")


@pytest.mark.parametrize("name", [*NAMES, "query", "problem", "input", "conversation", "dialogue", "PROMPT"])
@pytest.mark.parametrize("answers", [TEXTS, LAST])
def test_a_prompt_is_found_under_the_names_of_public_sets(name, answers):
    assert prompt({name: "q", **answers}) == [user("q")]
    assert prompt({name: [*EARLIER, user("q")], **answers}) == [*EARLIER, user("q")]
    turns = [{"from": "human", "value": "q"}]
    assert prompt({name: turns, **answers, "id": 3}) == [user("q")]


@pytest.mark.parametrize("name", ["system_prompt", "system", "System_Message"])
def test_a_system_message_is_found_under_the_names_of_public_sets(name):
    assert prompt({name: "be kind", "prompt": "q", **TEXTS}) == [SYSTEM, user("q")]
    assert prompt({name: "be kind", **WHOLE}) == [SYSTEM, user("q")]


@pytest.mark.parametrize(
    "history", [[["a", "b"]], [["user", "a"], ["assistant", "b"]], EARLIER, "\n\nHuman: a\n\nAssistant: b"]
)
def test_a_history_stands_before_the_prompt(history):
    assert prompt({"history": history, "prompt": "q", **TEXTS}) == [*EARLIER, user("q")]
    assert prompt({"chat_history": history, "question": "q", "system": "be kind", **TEXTS}) == [
        *(SYSTEM, *EARLIER, user("q")),
    ]
    assert prompt({"history": history, "prompt": [SYSTEM, user("q")], **TEXTS}) == [SYSTEM, *EARLIER, user("q")]
    whole = {"history": history, "prompt": [*EARLIER, user("q")], **LAST}
    assert prompt(whole) == [*EARLIER, user("q")]  # the prompt has it already


@pytest.mark.parametrize("name", ["context", "input", "passage", "document", "Context"])
def test_what_a_prompt_is_about_follows_it(name):
    for asked in ("prompt", "instruction", "question"):
        assert prompt({asked: "q", name: "the text", **TEXTS}) == [user("q\n\nthe text")]
    assert prompt({"prompt": "q", name: EARLIER, **TEXTS}) == [*EARLIER, user("q")]
    assert prompt({"prompt": "q: the text that is read", name: "the text  that is", **TEXTS}) == [
        user("q: the text that is read")
    ]
    assert prompt({"prompt": "another", name: "not", **TEXTS}) == [user("another\n\nnot")]  # by chance
    assert prompt({"prompt": "q", name: " ", **TEXTS}) == [user("q")]


@pytest.mark.parametrize(
    "cells",
    [
        {"history": "said before", "prompt": "q"},  # by whom?
        {"history": [user("a")], "prompt": "q"},  # unanswered
        {"history": ["a", "b", "c"], "prompt": "q"},
        {"context": "the text", "prompt": [user("q")]},  # of which turn?
        {"prompt": "q", **WHOLE, "chosen": [user("other"), assistant("yes")]},
        {"history": [{"asked": "a", "answered": "b"}], "prompt": "q"},
        {"prompt": [SYSTEM, user("q")], "chosen": [{**SYSTEM, "content": "be rude"}, *WHOLE["chosen"]]},
    ],
)
def test_what_cannot_be_put_together_is_a_bad_row(cells):
    assert prompt({**(TEXTS if "chosen" not in cells else {"rejected": WHOLE["rejected"]}), **cells}) == "not_read"


@pytest.mark.parametrize("answers", [TEXTS, LAST, WHOLE])
def test_a_prompt_that_is_a_whole_conversation_is_not_answered_twice(answers):
    assert prompt({"messages": WHOLE["chosen"], **answers}) == [user("q")]


def test_every_format_takes_a_history_and_a_context():
    for name in ("scored_text", "ranked", "stepwise", "boolean_text", "messages_completion", "labelled_responses"):
        row = {**ROWS[name], "prompt": "q", "history": [["a", "b"]], "passage": "p", "system_prompt": "be kind"}
        record = read(row)
        assert list(record.conversations[0][:-1]) == [SYSTEM, *EARLIER, user("q\n\np")]
    row = {**ROWS["judged_pair"], "input": "q", "history": [["a", "b"]]}
    assert list(read(row).conversations[0][:-1]) == [*EARLIER, user("q")]


@pytest.mark.parametrize("name", formats.FORMATS)
def test_the_formats_that_are_known_keep_their_columns(name):
    """No column of a format is taken for another, so its rows are read as they were before there were such names."""
    form, row = formats.FORMATS[name], {**ROWS, **NAMED}[name]
    assert columns.arranged(row, form.declared) == row


def test_names_that_the_config_gives():
    row = {"asked": "q", "better": "yes", "worse": "no", "meta": {"who": "be kind"}, "remark": "one two three four"}
    names = "prompt=asked, chosen=better,rejected=worse,system=meta.who,ignore=remark"
    assert prompt(row, columns=names) == [SYSTEM, user("q")]
    swapped = read({"prompt": "q", **TEXTS}, columns="chosen=rejected,rejected=chosen")
    assert [c[-1]["content"] for c in swapped.conversations] == ["no", "yes"]
    ranked = {"q": "q", "all": ["a", "b"], "order": [2, 1]}
    assert read(ranked, columns="prompt=q,responses=all,ranks=order").wins.tolist() == [[0, 0], [1, 0]]
    task = json.loads(json.dumps(ROWS["label_studio"]).replace('"prompt"', '"story"'))
    assert list(read(task, columns="data.prompt=data.story").conversations[0][:-1]) == [user("q")]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("prompt", "does not say what columns are"),
        ("prompt=a,prompt=b", "does not say what columns are"),
        ("=a", "does not say"),
        ("system=sytem_text", "there is no column 'sytem_text' to be 'system'.*did you mean 'system_text'"),
        ("prompt=system_text", "there is a column 'prompt'; say what that one is"),
    ],
)
def test_names_that_make_no_sense(names, says):
    with pytest.raises(ValueError, match=says):
        formats.detect([{"prompt": "q", "system_text": "s", **TEXTS}], columns=names)


# ----------------------------------------------------------------------------------------------------
# What nobody reads
# ----------------------------------------------------------------------------------------------------

PAIR = {"prompt": "q", **TEXTS}


@pytest.mark.parametrize(
    ("cells", "looks_like"),
    [
        ({"clue": "it lies in the north"}, "clue .context"),
        ({"clue": "它在北方很远很远的地方那里下着大雪。"}, "clue .context"),
        ({"turns_before": EARLIER}, "turns_before .context"),
        ({"question": "another"}, "question .context"),  # beside `prompt`
        ({"final_prompt": "x"}, "final_prompt .context"),
        ({"steps_so_far": ["first we add these two", "then"]}, "steps_so_far .context"),
        ({"chosen_logp": -3.5, "rejected_logp": -4}, "chosen_logp .a label, -3.5., rejected_logp .a label"),
        ({"strength_1": 2, "strength_2": 1}, "strength_1 .a label"),
        ({"score": 3}, "score .a label"),
        ({"chosen_score": 3, "rejected_score": None}, "chosen_score .a label"),
        ({"grade_better": 3, "grade_worse": 1}, "grade_better .a label, 3., grade_worse .a label"),
        ({"winner": "left"}, "winner .a label"),
        ({"images": [{"path": "a.png"}]}, "images .media"),
        ({"image_path": "a.png"}, "image_path .media"),
        ({"photo": b"\x89PNG"}, "photo .media"),
        ({"functions": [{"name": "f"}]}, "functions .media or tools"),
    ],
)
def test_what_looks_like_more_than_a_note_is_refused(cells, looks_like):
    with pytest.raises(ValueError, match=rf"not read as pair_text: {looks_like}.*config\.data\.columns") as error:
        formats.detect([{**PAIR, **cells}])
    ignored = ",".join(f"ignore={name}" for name, cell in cells.items() if cell is not None)
    assert f'"{ignored}"' in str(error.value)
    layout = formats.detect([{**PAIR, **cells}], columns=ignored)
    assert layout.unread == ()


def test_notes_are_named_with_an_example():
    notes = {"id": "a7", "model": "small model of last year", "lang": "en", "chosen_tokens": 3, "rejected_tokens": 4}
    notes |= {"chosen_reward_model": "m", "rejected_reward_model": "n", "at": "2024-01-01 10:00:00 +0000 UTC"}
    notes |= {"language": "English as it is spoken here"}
    notes |= {"meta": {"by": "me", "at": "noon"}, "nothing": None, "empty": []}
    layout = formats.detect([PAIR, {**PAIR, **notes}])
    assert dict(layout.unread) == {
        **{"id": "'a7'", "model": "'small model of last year'", "lang": "'en'", "chosen_tokens": "3"},
        **{"chosen_reward_model": "'m'", "rejected_reward_model": "'n'", "at": "'2024-01-01 10:00:00 +0000 UTC'"},
        **{"rejected_tokens": "4", "language": "'English as it is spoken here'", "meta": "{'by': 'me', 'at': 'noon'}"},
    }


def test_a_system_message_that_gives_way_is_named():
    rude = {"prompt": [{**SYSTEM, "content": "be rude"}, user("q")], **LAST}
    assert prompt({"system_prompt": "be kind", **rude})[0]["content"] == "be rude"
    assert dict(formats.detect([{"system_prompt": "be kind", **rude}]).unread) == {"system": "'be kind'"}
    assert formats.detect([{"system_prompt": "be kind", **WHOLE}]).unread == ()


def test_keys_inside_of_cells_are_named_too():
    assert dict(formats.detect([ROWS["scored_output"]]).unread) == {}
    output = [{**x, "critique": "fine", "label": {**x["label"]}} for x in ROWS["scored_output"]["output"]]
    assert dict(formats.detect([{**ROWS["scored_output"], "output": output}]).unread) == {"output[].critique": "'fine'"}
    assert "prompt.replies[].id" in dict(formats.detect([_tree_with_ids(ROWS["ranked_tree"])]).unread)
    assert formats.detect([ROWS["records"]]).unread == ()
    message = {**assistant("yes"), "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": "q", "chosen": [message], "rejected": [assistant("no")], "tools": tools}
    assert formats.detect([row]).unread == ()  # the chat template takes them whole


def _tree_with_ids(row):
    node = lambda x: {**x, "id": 7, "replies": [node(reply) for reply in x["replies"]]}
    return {"prompt": node(row["prompt"])}


def test_a_task_for_people_is_looked_into():
    row = json.loads(json.dumps(ROWS["label_studio"]))
    row["data"]["background"] = "the whole story that is told"
    with pytest.raises(ValueError, match=r"data\.background .context"):
        formats.detect([row])


def test_what_the_conversations_say_already_is_no_context():
    row = {"prompt": "q", "prompt_id": "0f", **WHOLE, "messages": WHOLE["chosen"], "question": " q"}
    layout = formats.detect([row])
    assert [path for path, _ in layout.unread] == ["prompt_id", "messages", "question"]
    assert layout.read(row, source="s", where="f:0")
    with pytest.raises(BadRow, match="not_read: messages says more than the conversations"):
        layout.read({**row, "messages": [user("something else")]}, source="s", where="f:1")


def test_columns_of_later_rows_are_looked_at():
    layout, unread = formats.detect([PAIR, {**PAIR, "clue": None}]), {}
    assert layout.read({**PAIR, "shelf": "b"}, source="s", where="f:5", unread=unread) and unread == {"shelf": "'b'"}
    with pytest.raises(BadRow, match="not_read: clue is not read and looks like context"):
        layout.read({**PAIR, "clue": "it lies in the north"}, source="s", where="f:6")
    (record,) = layout.read({**PAIR, "history": [["a", "b"]]}, source="s", where="f:7")
    assert list(record.conversations[0][:-1]) == [*EARLIER, user("q")]


def test_formats_that_are_named_as_they_are_published_refuse_nothing():
    row = {**NAMED["reward_bench"], "context": "a text that nobody reads", "chosen_model": "m"}
    assert "context" in dict(formats.detect([row], "reward_bench").unread)
    row = {**TEXTS, "clue": "it lies in the north"}
    assert dict(formats.detect([row], "pair_plain").unread) == {"clue": "'it lies in the north'"}


def test_what_is_not_read_is_told_once(tmp_path, capsys):
    source = tmp_path / "pairs.jsonl"
    rows = [{**PAIR, "id": i, "shelf": "b"} for i in range(3)]
    source.write_text("".join(json.dumps({**row, "prompt": f"q{i}"}) + "\n" for i, row in enumerate(rows)))
    for argv in (["inspect"], ["convert", f"--output={tmp_path}/out.parquet"]):
        data_command.main([argv[0], str(source), *argv[1:]])
        assert capsys.readouterr().out.count("not read: id (e.g. 0), shelf (e.g. 'b')") == 1
    data_command.main(["convert", str(source), f"--output={tmp_path}/out.parquet", "--columns=ignore=shelf,ignore=id"])
    assert "not read" not in capsys.readouterr().out
    audit = Audit()
    assert len(list(reading.records(str(source), audit=audit))) == 3
    assert Audit.from_json(audit.to_json()).unread == {"id": "0", "shelf": "'b'"}
    together = Audit(rows=2, unread={"id": "7"})
    together.merge(audit)
    assert together.unread == {"id": "7", "shelf": "'b'"} and sum("not read" in x for x in rows_lines(together)) == 1


# ----------------------------------------------------------------------------------------------------
# Transcripts, whole conversations, ratings
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "Human: q ", "chosen": "Assistant: yes", "rejected": "Assistant: no"}, [user("q")]),
        ({"prompt": "Human: q", **TEXTS}, [user("q")]),
        ({"prompt": "q", "chosen": "\n\nAssistant: yes", "rejected": "\n\nAssistant: no"}, [user("q")]),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " yes", "rejected": " no"}, [user("q")]),
        ({"prompt": "be kind\n\nHuman: q\n\nAssistant:", **TEXTS}, [SYSTEM, user("q")]),
        ({"prompt": "Human: a\n\nAssistant: b\n\nHuman: q", **TEXTS}, [*EARLIER, user("q")]),
        ({side: f"be kind\n\nHuman: q\n\nAssistant: {text}" for side, text in TEXTS.items()}, [SYSTEM, user("q")]),
        (
            {"prompt": "be kind\n\nHuman: q"} | {side: f"\n\nAssistant: {text}" for side, text in TEXTS.items()},
            [SYSTEM, user("q")],
        ),
        ({"prompt": "Human: q\nAssistant:", "chosen": " yes", "rejected": " no"}, [user("q")]),
        ({"prompt": "Human: a\r\nAssistant: b\r\nHuman: q\r\nAssistant:", **TEXTS}, [*EARLIER, user("q")]),
        ({side: f"\r\n\r\nHuman: q\r\n\r\nAssistant: {text}" for side, text in TEXTS.items()}, [user("q")]),
        (
            {"prompt": "\n\nHuman: q\n\nAssistant:"}
            | {side: f"\n\nHuman: q\n\nAssistant: {text}" for side, text in TEXTS.items()},
            [user("q")],
        ),
        (
            {"prompt": "Human: a\n\nAssistant: b"}
            | {side: f"\n\nHuman: q\n\nAssistant: {text}" for side, text in TEXTS.items()},
            [*EARLIER, user("q")],
        ),
    ],
)
def test_transcripts_however_they_are_divided(row, turns):
    assert formats.detect([row]).name == "pair_transcript"
    assert prompt(row) == turns


def test_transcripts_are_prompts_of_other_formats():
    asked = "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant:"
    for row in (
        {"prompt": asked, "response": " yes", "score": 3},
        {"prompt": asked.removesuffix("\n\nAssistant:"), "response": "\n\nAssistant: yes", "score": 3},
        {"prompt": asked, "completion": "yes"},
        {"prompt": asked, "responses": ["yes", "no"], "ranks": [1, 2]},
    ):
        (first, *_) = read(row).conversations
        assert [(m["role"], m["content"].strip()) for m in first] == [
            *(("user", "a"), ("assistant", "b"), ("user", "q"), ("assistant", "yes")),
        ]


def test_texts_that_quote_a_dialogue_are_texts():
    row = {"prompt": "Go on:\n\nHuman: hi\n\nAssistant: hello", **TEXTS}
    assert formats.detect([row]).name == "pair_text" and prompt(row) == [user(row["prompt"])]
    row = {"prompt": "q", "chosen": "As in\n\nHuman: hi\n\nAssistant: yo", "rejected": "no"}
    assert formats.detect([row]).name == "pair_text"


def test_a_system_message_that_only_the_prompt_has_is_kept():
    assert prompt({"prompt": [SYSTEM, user("q")], **WHOLE}) == [SYSTEM, user("q")]
    own = {side: [SYSTEM, *turns] for side, turns in WHOLE.items()}
    assert prompt({"prompt": [SYSTEM, user("q")], **own}) == prompt({"prompt": "q", **own}) == [SYSTEM, user("q")]
    many = {side: [*EARLIER, *turns] for side, turns in WHOLE.items()}
    assert prompt({"prompt": "q", **many}) == [*EARLIER, user("q")]


@pytest.mark.parametrize(
    "names",
    [
        *(("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating")),
        *(("chosen-rating", "rejected-rating"), ("chosen_reward", "rejected_reward"), ("chosenScore", "rejectedScore")),
        *(("rating_chosen", "rating_rejected"), ("chosen_avg_rating", "rejected_avg_rating")),
    ],
)
def test_ratings_of_both_sides_are_margins(names):
    record = read({**PAIR, **dict(zip(names, (5.0, 2)))})
    assert record.margin.tolist() == [[0, 3], [0, 0]] and record.attributes == {"score": (5, 2)}
    layout = formats.detect([{**PAIR, **dict(zip(names, (5.0, 2)))}])
    assert layout.unread == ()
    with pytest.raises(BadRow, match="conflicting_label"):
        layout.read({**PAIR, **dict(zip(names, (1, 2)))}, source="s", where="f:1")


def test_second_ratings_of_both_sides_are_refused():
    row = {**PAIR, "chosen_score": 5, "rejected_score": 2, "chosen_rating": 1, "rejected_rating": 3}
    with pytest.raises(ValueError, match=r"chosen_rating .a label"):
        formats.detect([row])

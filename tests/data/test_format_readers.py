"""What the readers make of scores, verdicts, rankings and steps, worked by hand; and what they refuse or leave out."""

import json
import math

import numpy as np
import pytest
from format_rows import NAMED, ROWS, assistant, user

from rmjax.data import formats
from rmjax.data.records import BadRow, Step, check_conversation, compare

NAN = math.nan


def read_all(name, changes=None, defects=None, **kwargs):
    good = {**ROWS, **NAMED}[name]
    row = {c: cell for c, cell in {**good, **(changes or {})}.items() if cell is not ...}
    layout = formats.detect([good], name)
    return layout.read(row, source="here", where="f:0", defects=defects, **kwargs)


def read(name, changes=None, **kwargs):
    (record,) = read_all(name, changes, **kwargs)
    return record


def reason(name, changes, **kwargs):
    with pytest.raises(BadRow) as error:
        read_all(name, changes, **kwargs)
    return error.value.reason


def texts(record):
    return [conversation[-1]["content"] for conversation in record.conversations]


def prompts(record):
    return {tuple(m["content"] for m in conversation[:-1]) for conversation in record.conversations}


# ----------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------


def test_scored_text_has_every_column_of_numbers_as_an_attribute():
    row = {**ROWS["scored_text"], "idx": 7, "prompt_id": 3, "model": "m"}
    rows = [row, {**row, "coherence": 2}]
    layout = formats.detect(rows)
    assert layout.attributes == ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    (record,) = layout.read(row, source="here", where="f:0")
    np.testing.assert_equal(
        dict(record.attributes),
        {"helpfulness": (3,), "correctness": (4,), "coherence": (NAN,), "complexity": (NAN,), "verbosity": (1.5,)},
    )
    assert list(record.conversations[0]) == [user("a"), assistant("b"), user("q"), assistant("yes")]
    with pytest.raises(BadRow, match="helpfulness is str 'high', expected a finite number"):
        layout.read({**row, "helpfulness": "high"}, source="here", where="f:0")


def test_an_answer_that_the_messages_end_with_is_read_once():
    talk = [user("q"), assistant("a")]
    row = {"messages": talk, "response": "a", "score": 1}
    (record,) = formats.detect([row]).read(row, source="here", where="f:0")
    assert list(record.conversations[0]) == talk


def test_a_wrong_score_among_the_first_rows_is_a_bad_row_not_another_format():
    good = {"prompt": "q", "response": "a", "score": 1}
    assert formats.detect([good, good, {**good, "score": "x"}]).attributes == ("score",)


def test_outputs_are_compared_by_their_only_score_or_the_one_of_that_name():
    several = read("scored_output")
    assert not several.wins.any() and several.attributes["helpful"] == (4, 2) and several.source == "ours"
    outputs = lambda *labels: {"output": [{"content": f"r{i}", "label": x} for i, x in enumerate(labels)]}
    one = read("scored_output", outputs({"quality": 1}, {"quality": 3.5}, {"quality": 1}))
    assert one.wins.tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert one.margin[1].tolist() == [2.5, 0, 2.5] and one.ties.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    named = read("scored_output", outputs({"score": 1, "tone": 9}, {"score": 2, "tone": 3}))
    assert named.wins.tolist() == [[0, 0], [1, 0]]
    single = read("scored_output", {"output": ROWS["scored_output"]["output"][0]})
    assert single.attributes == {"helpful": (4.0,), "honest": (1.0,)}
    assert reason("scored_output", {"output": [{"content": "a"}]}) == "wrong_type"


def test_compare_by_hand():
    said = compare([2.0, NAN, 2.0, 5.0])
    assert said["wins"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]
    assert said["ties"].tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert said["margin"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [3, 0, 3, 0]]


def test_compare_agrees_with_scipys_ranks():
    import scipy.stats

    scores = np.random.default_rng(0).integers(0, 4, (50, 6)).astype(float)
    for row in scores:
        said = compare(row)
        np.testing.assert_array_equal(said["wins"].sum(axis=1), scipy.stats.rankdata(row, "min") - 1)
        np.testing.assert_array_equal(said["wins"].sum(axis=0), scipy.stats.rankdata(-row, "min") - 1)
        np.testing.assert_array_equal(said["wins"] + said["wins"].T + said["ties"], 1 - np.eye(6))


@pytest.mark.parametrize(("label", "value"), [(True, 1), (False, 0), (1, 1), (0, 0)])
def test_boolean_labels(label, value):
    assert read("boolean", {"label": label}).attributes == {"label": (value,)}
    assert read("boolean_text", {"label": label}).attributes == {"label": (value,)}
    assert reason("boolean", {"label": 2}) == reason("boolean", {"label": "yes"}) == "wrong_type"


def test_nemo_text():
    record = read("nemo_text")
    assert [m["role"] for m in record.conversations[0]] == ["system", "user", "assistant"]
    assert texts(record) == ["two\n\nparts"]
    assert record.attributes["helpfulness"] == (4,) and math.isnan(record.attributes["quality"][0])
    no_system = ROWS["nemo_text"]["text"].replace("be kind", "")
    assert [m["role"] for m in read("nemo_text", {"text": no_system}).conversations[0]] == ["user", "assistant"]
    assert reason("nemo_text", {"label": [1.0]}) == "wrong_type"


# ----------------------------------------------------------------------------------------------------
# Verdicts
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preferred", "wins", "ties"), [("A", (1, 0), 0), ("B", (0, 1), 0), ("tie", (0, 0), 1), ("Tie", (0, 0), 1)]
)
def test_judged_pair(preferred, wins, ties):
    record = read("judged_pair", {"metadata": {"preferred": preferred, "preference_strength": -2}})
    assert (record.wins[0, 1], record.wins[1, 0], record.ties[0, 1]) == (*wins, ties)
    assert (record.margin[0, 1], record.margin[1, 0]) == (2 * wins[0], 2 * wins[1])
    for unknown in (None, 0, "C"):
        assert reason("judged_pair", {"metadata": {"preferred": unknown}}) == "wrong_type"


@pytest.mark.parametrize(
    ("votes", "wins", "tie", "agreement"),
    [
        ((1, 1, 1), (1, 0), 0, 1),
        ((1, 2, 1), (2 / 3, 1 / 3), 0, 2 / 3),
        ((0, 2, 1), (1 / 3, 1 / 3), 1 / 3, 1 / 3),
        ((0, 0, 0), (0, 0), 1, 1),
        ((None, 2, 0), (0, 1 / 2), 1 / 2, 1 / 2),
    ],
)
def test_annotated_pair_has_shares_of_votes(votes, wins, tie, agreement):
    record = read("annotated_pair", {f"annotator{i + 1}": vote for i, vote in enumerate(votes)})
    np.testing.assert_allclose([record.wins[0, 1], record.wins[1, 0], record.ties[0, 1]], [*wins, tie], rtol=1e-6)
    assert record.agreement == pytest.approx(agreement)
    assert prompts(record) == {("Add.\n\n2 + 2",)}


def test_annotated_pair_refuses_other_conventions():
    assert reason("annotated_pair", {"annotator2": 3}) == "wrong_type"
    assert reason("annotated_pair", {"annotator2": True}) == "wrong_type"
    assert reason("annotated_pair", dict.fromkeys(("annotator1", "annotator2", "annotator3"))) == "no_label"
    assert prompts(read("annotated_pair", {"input": ""})) == {("Add.",)}


@pytest.mark.parametrize(
    ("strength", "wins", "tie"), [(-3, (1, 0), 0), (-1, (1, 0), 0), (0, (0, 0), 1), (2, (0, 1), 0)]
)
def test_signed_strengths(strength, wins, tie):
    for name, column in (("strength_pair", "preference_strength"), ("strength_chat", "overall_preference")):
        record = read(name, {column: strength})
        assert (record.wins[0, 1], record.wins[1, 0], record.ties[0, 1]) == (*wins, tie)
        assert record.margin.max() == abs(strength)
    assert reason("strength_pair", {"preference_strength": 4}) == "wrong_type"


def test_agreement_is_the_share_on_the_labels_side():
    assert read("strength_pair").agreement == pytest.approx(2 / 3)  # -100 is no vote
    assert read("strength_chat").agreement == 1
    assert math.isnan(read("strength_chat", {"individual_preference": None}).agreement)
    assert len(read("strength_chat").conversations[0]) == 4


# ----------------------------------------------------------------------------------------------------
# Rankings
# ----------------------------------------------------------------------------------------------------


def test_ranked_by_ranks_or_scores():
    by_rank = read("ranked")  # ranks 2, 1, 2, none
    assert by_rank.wins.tolist() == [[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert by_rank.ties[0, 2] == by_rank.ties[2, 0] == 1 == by_rank.ties.sum() / 2
    assert not by_rank.largest_margin and by_rank.attributes == {"score": (3, 5, 3, 9)}
    by_score = read("ranked", {"ranks": None})
    assert by_score.wins.tolist() == [[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    assert by_score.margin[3].tolist() == [6, 4, 6, 0]
    assert reason("ranked", {"ranks": [1, 2]}) == reason("ranked", {"scores": [1]}) == "conflicting_label"


def test_a_bad_response_of_a_ranking_leaves_the_others():
    changes = {"responses": ["a", "b", " ", "b"], "ranks": [1, 2, 3, 4], "scores": None}
    assert reason("ranked", changes) == "empty_response"  # nobody counts what is left out
    defects = []
    record = read("ranked", changes, defects=defects)
    assert texts(record) == ["a", "b"] and record.wins.tolist() == [[0, 1], [0, 0]]
    assert [bad.reason for bad in defects] == ["empty_response", "identical_responses"]
    assert "responses 2 and 4 of 4" in defects[1].detail
    assert reason("ranked", {"responses": ["a", "a", "a", ""]}, defects=[]) == "identical_responses"
    kept = read("ranked", changes, defects=defects, keep=True)
    assert texts(kept) == ["a", "b", " ", "b"] and len(defects) == 4


@pytest.mark.parametrize("name", ["ranked", "reward_bench_2"])
def test_a_row_of_more_responses_than_arrays_of_all_pairs_can_hold(name):
    """Of 100,000 responses each of three arrays would take 40 GB."""
    many = [str(i) for i in range(100_000)]
    changes = {"ranked": {"responses": many, "ranks": list(range(len(many))), "scores": None}}
    assert reason(name, changes.get(name, {"rejected": many})) == "too_many_responses"


def test_a_pair_is_lost_with_either_response():
    assert reason("judged_pair", {"output": [{"content": "a"}, {"content": ""}]}, defects=[]) == "empty_response"


def test_ranked_answers_take_a_transcript_as_prompt():
    record = read("ranked_answers")
    assert prompts(record) == {("q",)} and record.wins.tolist() == [[0, 0], [1, 0]]
    assert record.source == "here"  # a list of sources is no name
    turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant:"
    assert prompts(read("ranked_answers", {"prompt": turns})) == {("a", "b", "q")}
    assert reason("ranked_answers", {"prompt": turns + " well"}) == "wrong_type"


def test_a_tree_has_a_record_for_each_message_with_ranked_replies():
    first, second = read_all("ranked_tree")
    assert texts(first) == ["a", "b"] and first.wins.tolist() == [[0, 0], [1, 0]]
    assert prompts(second) == {("q", "a", "and?")} and second.wins.sum() == 3
    assert (first.row, second.row) == ("f:0.0", "f:0.1")


def test_a_message_of_which_some_replies_are_unranked_is_counted_and_the_rest_of_the_tree_is_read():
    tree = ROWS["ranked_tree"]["prompt"]
    a, b = tree["replies"]
    changes = {"prompt": {**tree, "replies": [a, {**b, "rank": None}]}}
    assert reason("ranked_tree", changes) == "no_label"
    defects = []
    (record,) = read_all("ranked_tree", changes, defects=defects)
    assert texts(record) == ["c", "d", "e"]
    assert [(bad.reason, bad.detail) for bad in defects] == [("no_label", "1 of 2 replies have no rank")]
    assert reason("ranked_tree", {"prompt": {**tree, "replies": []}}, defects=[]) == "no_label"


def test_comparisons_are_a_partial_order():
    record = read("comparisons")  # 12: 1, 13: 2, 14: tie, 23: 1, 24: 2, 34: none
    won = {(i + 1, j + 1) for i, j in np.argwhere(record.wins)}
    assert won == {(1, 2), (3, 1), (2, 3), (4, 2)}  # not transitive, and kept as it was said
    assert {(i + 1, j + 1) for i, j in np.argwhere(record.ties)} == {(1, 4), (4, 1)}
    assert prompts(record) == {("q\n\nTitle\nOne. Two.\n\nOther\nThree.",)}
    assert prompts(read("comparisons", {"passages": None})) == {("q",)}
    assert reason("comparisons", {"preference": [1, 2, 0, 1, 2, 3]}) == "wrong_type"
    assert reason("comparisons", {"preference": [1, 2]}) == "conflicting_label"


def test_labelled_responses():
    record = read("labelled_responses")
    assert record.wins.tolist() == [[0, 0], [1, 0]] and record.margin[1, 0] == 1.25
    columns = {"rewards": ..., "response_10": "c", "reward_1": 2, "reward_2": 1, "reward_10": 2}
    ten = read("labelled_responses", columns)
    assert texts(ten) == ["a", "b", "c"] and ten.attributes == {"score": (2, 1, 2)} and ten.ties[0, 2] == 1
    assert reason("labelled_responses", {"rewards": [1.0]}) == "conflicting_label"


def test_ultrafeedback_compares_by_its_overall_score():
    record = read("ultrafeedback")
    assert record.wins.tolist() == [[0, 1], [0, 0]] and record.margin[0, 1] == 4.5
    np.testing.assert_equal(record.attributes["honesty"], (NAN, 1.0))
    assert record.source == "evol_instruct"


# ----------------------------------------------------------------------------------------------------
# Steps
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stepwise", "stepwise_text", "shepherd_text", "prm800k"])
def test_steps_end_where_their_text_ends(name):
    record = read(name)
    for text, steps in zip(texts(record), record.steps):
        assert [step.stop for step in steps] == sorted(step.stop for step in steps)
        assert all(text[step.stop - 1] in ".6s" for step in steps) and steps[-1].stop <= len(text)


def test_stepwise():
    record = read("stepwise")
    assert texts(record) == ["2 + 2 = 4.\n4 + 1 = 6.\nSo 6."]
    assert [step.stop for step in record.steps[0]] == [10, 21, 27]
    np.testing.assert_equal([step.label for step in record.steps[0]], [1, 0, NAN])
    assert texts(read("stepwise", {"separator": " "})) == ["2 + 2 = 4. 4 + 1 = 6. So 6."]
    assert texts(read("stepwise", {"separator": ""})) == ["2 + 2 = 4.4 + 1 = 6.So 6."]
    assert reason("stepwise", {"labels": [True]}) == "conflicting_label"
    assert reason("stepwise", {"labels": [True, 2, False]}) == "wrong_type"
    assert reason("stepwise", {"completions": ["a", " ", "b"]}) == "empty_response"


def test_stepwise_text_keeps_what_was_written():
    record = read("stepwise_text")
    assert texts(record) == [ROWS["stepwise_text"]["response"]]
    assert record.steps == ((Step(10, 1.0), Step(26, 0.25)),)
    plain = {"separator": None, "response": "one\n\n\n\ntwo\n\nthree", "labels": [1, -100, 0]}
    stops = read("stepwise_text", plain).steps[0]
    assert [step.stop for step in stops] == [3, 10, 17] and math.isnan(stops[1].label)
    assert reason("stepwise_text", {"labels": [1]}) == "conflicting_label"


def test_math_shepherd():
    record = read("shepherd_text")
    assert prompts(record) == {("What is 2 + 2 + 1?",)}
    assert texts(record) == ["Step 1: 2 + 2 = 4.\nStep 2: 4 + 1 = 6. The answer is: 6"]
    assert record.steps == ((Step(18, 1.0), Step(54, 0.0)),)
    label = ROWS["shepherd_text"]["label"]
    assert reason("shepherd_text", {"label": label.replace("+\n", "?\n")}) == "conflicting_label"
    assert reason("shepherd_text", {"label": label.replace("6", "7")}) == "conflicting_label"
    assert reason("shepherd_text", {"input": "no steps ки"}) == "wrong_type"


def test_prm800k_has_a_response_for_each_alternative():
    record = read("prm800k")
    assert texts(record) == ["2 + 2 = 4.\n4 + 1 = 5.", "2 + 2 = 5.", "2 + 2 = 4.\n4 + 1 is"]
    assert [[step.label for step in steps] for steps in record.steps] == [[1, 1], [0], [1, 1]]
    first = ROWS["prm800k"]["label"]["steps"][0]
    found_error = {"label": {"steps": [{**first, "chosen_completion": None}]}}
    assert texts(read("prm800k", found_error)) == ["2 + 2 = 4.", "2 + 2 = 5."]
    assert reason("prm800k", {"label": {"steps": []}}) == "no_label"
    assert reason("prm800k", {"label": {"steps": [{"completions": [{"rating": 1}]}]}}) == "wrong_type"


# ----------------------------------------------------------------------------------------------------
# Other
# ----------------------------------------------------------------------------------------------------


def test_prometheus_both_ways():
    rated, written = read("prometheus"), read("prometheus_judge")
    assert prompts(rated) == {("q\n\nmore",)} and texts(rated) == ["the answer"]
    assert rated.attributes == {"score": (pytest.approx(8 / 3),)} and rated.agreement == pytest.approx(2 / 3)
    assert texts(written)[0] == "Feedback: x [RESULT] 3" and len(written.conversations) == 3
    assert not written.attributes and not written.wins.any()
    ((asked,),) = prompts(written)
    assert asked.startswith("###Task Description") and asked.endswith("Score 1: no")


def test_unieval_takes_source_as_text():
    record = read("unieval")
    assert prompts(record) == {("hi there\n\na fact",)} and record.source == "here"
    assert record.attributes == {"naturalness": (2.5,), "overall": (4,)}


def test_conversations_without_labels():
    for name in ("messages", "messages_completion"):
        record = read(name)
        assert texts(record) == ["yes"] and not record.attributes and not record.wins.any()
    assert reason("messages", {"messages": [user("q")]}) == "no_assistant_turn"


def test_system_and_tools_reach_every_format():
    tools = [{"type": "function", "function": {"name": "f"}}]
    for name in ("scored_text", "boolean", "judged_pair", "ranked", "stepwise", "messages", "comparisons"):
        for record in read_all(name, {"system": "be brief", "tools": tools, "weight": 0.5}):
            assert all(c[0] == {"role": "system", "content": "be brief"} for c in record.conversations)
            assert record.tools == tuple(tools) and record.weight == 0.5


def test_half_a_surrogate_pair_is_refused():
    assert reason("scored_text", {"response": "\ud83d"}) == "wrong_type"


CHAT = {"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}
# Rows in the shape that the sets' own descriptions give them, with all their columns.
SET_ROWS = {
    "helpsteer2": ROWS["scored_text"],
    "helpsteer2_preference": ROWS["strength_pair"],
    "helpsteer3_preference": ROWS["strength_chat"],
    "ultrafeedback": ROWS["ultrafeedback"],
    "ultrafeedback_binarized": {
        "prompt": "q",
        "prompt_id": "0f",
        **CHAT,
        "messages": CHAT["chosen"],
        "score_chosen": 8.5,
        "score_rejected": 8.0,
    },
    "hh-rlhf": ROWS["pair_transcript"],
    "skywork": {**CHAT, "source": "magpie"},
    "nectar": ROWS["ranked_answers"],
    "math_shepherd": ROWS["shepherd_text"],
    "math_shepherd_trl": ROWS["stepwise"],
    "prm800k_trl": ROWS["stepwise"],
}


# Where each set lies on the hub, and the format that reads it.
CONVERSIONS = {
    "helpsteer2": ("hf://datasets/nvidia/HelpSteer2/train.jsonl.gz", "scored_text"),
    "helpsteer2_preference": ("hf://datasets/nvidia/HelpSteer2/preference/preference.jsonl.gz", "strength_pair"),
    "helpsteer3_preference": ("hf://datasets/nvidia/HelpSteer3/preference/train.jsonl.gz", "strength_chat"),
    "ultrafeedback": ("hf://datasets/openbmb/UltraFeedback/*.jsonl", "ultrafeedback"),
    "ultrafeedback_binarized": (
        "hf://datasets/HuggingFaceH4/ultrafeedback_binarized/data/train_prefs-*.parquet",
        "pair_messages",
    ),
    "hh-rlhf": ("hf://datasets/Anthropic/hh-rlhf/h*/train.jsonl.gz", "pair_transcript"),
    "skywork": ("hf://datasets/Skywork/Skywork-Reward-Preference-80K-v0.2/data/*.parquet", "pair_messages"),
    "nectar": ("hf://datasets/berkeley-nest/Nectar/data/rlaif.parquet", "ranked_answers"),
    "math_shepherd": ("hf://datasets/peiyi9979/Math-Shepherd/math-shepherd.jsonl", "shepherd_text"),
    "math_shepherd_trl": ("hf://datasets/trl-lib/math_shepherd/data/train-*.parquet", "stepwise"),
    "prm800k_trl": ("hf://datasets/trl-lib/prm800k/data/train-*.parquet", "stepwise"),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_public_sets_are_detected(name):
    source, form = CONVERSIONS[name]
    layout = formats.detect([SET_ROWS[name]])
    assert layout.name == form
    assert layout.read(SET_ROWS[name], source=source, where="f:0")


def test_scores_of_both_names_are_margins():
    row = SET_ROWS["ultrafeedback_binarized"]
    (record,) = formats.detect([row]).read(row, source="here", where="f:0")
    assert record.margin.tolist() == [[0, 0.5], [0, 0]]
    assert record.attributes == {"score": (8.5, 8.0)}
    with pytest.raises(BadRow, match="conflicting_label: its scores are 7 and 8"):
        formats.detect([row]).read({**row, "score_chosen": 7}, source="here", where="f:0")


def parts(*texts):
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


@pytest.mark.parametrize("answer", [parts("yo"), ["y", "o"], {"type": "output_text", "text": "yo", "annotations": []}])
def test_contents_of_text_parts_are_text(answer):
    turns = [{"role": "user", "content": parts("Look: ", "what is it?")}, {"role": "assistant", "content": answer}]
    rejected = [turns[0], {"role": "assistant", "content": "no"}]
    record = read("pair_messages", {"prompt": ..., "chosen": turns, "rejected": rejected})
    assert [m["content"] for m in record.conversations[0]] == ["Look: what is it?", "yo"]
    assert record.conversations[0][0] == record.conversations[1][0]
    assert check_conversation(turns) == record.conversations[0]


@pytest.mark.parametrize(
    "part, named",
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "'image_url'"),
        ({"type": "image", "text": None}, "'image'"),
        ({"type": "text", "text": "see", "image": "a.png"}, "'image'"),
        ({"input_audio": {"data": ""}}, "'input_audio'"),
        ({"type": "text", "text": None}, "no text"),
        (3, "is int"),
    ],
)
def test_other_parts_are_refused_by_name(part, named):
    turns = [{"role": "user", "content": [*parts("what is it?"), part]}, {"role": "assistant", "content": "yo"}]
    with pytest.raises(BadRow, match=rf"the user's content .*{named}") as refused:
        check_conversation(turns)
    assert refused.value.reason == "wrong_type"


def test_tool_calls_that_are_no_list_are_refused():
    with pytest.raises(BadRow, match=r"tool_calls is str '\[\{\}\]', expected a list"):
        check_conversation([{"role": "assistant", "content": "", "tool_calls": "[{}]"}])


def test_descriptions_of_tools_may_be_json_each():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    for tools in (json.dumps([tool]), [json.dumps(tool)], [tool]):
        assert read("pair_text", {"tools": tools}).tools == (tool,)
    with pytest.raises(BadRow, match="a tool description is str 'look up', expected an object"):
        read("pair_text", {"tools": ["look up"]})

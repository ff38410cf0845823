"""Label Studio: what is written, and what comes back from exports of several people."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest

from rmjax.data import agreement, formats, labelling, sources
from rmjax.data.ledger import Audit
from rmjax.data.records import BadRow, group, pair

user = lambda text: {"role": "user", "content": text}
assistant = lambda text: {"role": "assistant", "content": text}

PROMPT = [user("hi\nthere"), assistant("yes?"), user("more")]
RECORDS = [
    pair([*PROMPT, assistant("x")], [*PROMPT, assistant("y")], source="mine", row="a.jsonl:0", weight=0.5),
    pair([user("q"), assistant("é")], [user("q"), assistant("z")], row="a.jsonl:1", tools=[{"name": "f"}]),
    pair([user("q"), assistant("1"), user("r"), assistant("x")], [user("q"), assistant("y")], row="b.jsonl:7"),
]


def result(kind, value, control="preference", about="prompt"):
    key = {"pairwise": "selected", "choices": "choices"}.get(kind, kind)
    return {"id": "x", "from_name": control, "to_name": about, "type": kind, "value": {key: value}}


def annotation(person, *results, cancelled=False, at="2026-01-01T00:00:00Z"):
    """As Label Studio exports it."""
    by = person if isinstance(person, int) else {"id": 1, "email": person, "first_name": "", "last_name": ""}
    return {
        **{"id": 1, "completed_by": by, "result": list(results), "was_cancelled": cancelled, "ground_truth": False},
        **{"created_at": at, "updated_at": at, "lead_time": 4.2, "result_count": len(results)},
    }


def export(task, *annotations):
    return {**task, "id": 1, "annotations": list(annotations), "predictions": [], "meta": {}, "project": 83}


def task(**data):
    return {"data": {"prompt": "q", "response_1": "x", "response_2": "y", **data}}


def read(row, **kwargs):
    layout = formats.detect([row])
    assert layout.name == "label_studio"
    (record,) = layout.read(row, source="export", where="export.json:0", **kwargs)
    return record


def reason(row):
    with pytest.raises(BadRow) as bad:
        read(row)
    return bad.value.reason, bad.value.detail


def choose(task, best):
    """The verdict of somebody who thinks that response `best` of the record is better, seeing them as shown."""
    return result("choices", [("left", "right")[task["data"]["rmjax"]["order"].index(best)]])


def test_records_come_back_as_they_went(tmp_path):
    assert labelling.write_project(tmp_path, RECORDS) == 3
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    rows = [export(t, annotation(7, choose(t, i % 2))) for i, t in enumerate(tasks)]
    (tmp_path / "export.json").write_text(json.dumps(rows))
    for i, (where, row) in enumerate(sources.open_source(str(tmp_path / "export.json"))):
        assert where == f"export.json:{i}"
        before, after = RECORDS[i], read(row)
        assert after.conversations == before.conversations
        assert (after.row, after.weight, after.tools) == (before.row, before.weight, before.tools)
        assert after.source == before.source or (after.source, before.source) == ("export", "")
        np.testing.assert_array_equal(after.wins, [[0, 1], [0, 0]] if i % 2 == 0 else [[0, 0], [1, 0]])


def test_tasks_do_not_give_the_label_away():
    records = [pair([user("q"), assistant("good")], [user("q"), assistant("bad")], row=str(i)) for i in range(200)]
    tasks = list(labelling.tasks(records))
    left = sum(task["data"]["response_1"][0]["content"] == "good" for task in tasks)
    assert 70 < left < 130  # five standard deviations of fair coins are 35
    assert tasks == list(labelling.tasks(records)) != list(labelling.tasks(records, seed=1))
    assert not {"wins", "chosen", "preference"} & set(json.dumps(tasks[0]).split('"'))


def test_the_prompt_is_what_all_conversations_begin_with():
    first, _, third = (task["data"] for task in labelling.tasks(RECORDS))
    assert first["prompt"] == PROMPT
    assert third["prompt"] == [user("q")]
    sizes = {len(third["response_1"]), len(third["response_2"])}
    assert sizes == {1, 3}


def test_the_configuration_names_what_the_tasks_have():
    for kind, responses in (("preference", 2), ("rating", 3)):
        config = ElementTree.fromstring(labelling.labelling_config(kind, responses, ("helpful", "brief"), (0, 4)))
        shown = {tag.get("name"): tag.get("value") for tag in config.iter("Paragraphs")}
        assert shown == {name: f"${name}" for name in ("prompt", *(f"response_{i + 1}" for i in range(responses)))}
        controls = [*config.iter("Choices"), *config.iter("Rating")]
        assert all(control.get("toName") in shown for control in controls)
        assert len({control.get("name") for control in controls}) == len(controls) == (1 if responses == 2 else 6)
    assert {control.get("maxRating") for control in controls} == {"5"}


def test_a_configuration_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="unknown kind of labelling 'ranking'; known: preference, rating"):
        labelling.labelling_config("ranking")
    with pytest.raises(ValueError, match="between 2 responses, the tasks have 3"):
        labelling.labelling_config("preference", 3)
    with pytest.raises(ValueError, match=r"scale of 2 to 10 whole numbers; got \['quality'\] and \(0, 100\)"):
        labelling.labelling_config("rating", scale=(0, 100))


def test_records_of_other_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one has 1 responses, those before it 2"):
        labelling.write_project(tmp_path, [*RECORDS, group([[user("q"), assistant("x")]], row="one")])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no records"):
        labelling.write_project(tmp_path, [])


def test_votes_are_shares_with_ties_and_agreement():
    words = [["left"], ["left"], ["right"], ["tie"]]
    record = read(export(task(), *(annotation(i, result("choices", w)) for i, w in enumerate(words))))
    np.testing.assert_allclose(record.wins, [[0, 0.5], [0.25, 0]])
    np.testing.assert_allclose(record.ties, [[0, 0.25], [0.25, 0]])
    assert record.agreement == 0.5
    assert [c[-1]["content"] for c in record.conversations] == ["x", "y"]


def test_the_pairwise_control_of_other_projects():
    row = {"data": {"prompt": "q", "answer1": "x", "answer2": "y"}}
    record = read(export(row, annotation("a@b.c", result("pairwise", "right", "comparison", "comparison"))))
    assert record.wins.tolist() == [[0, 0], [1, 0]] and record.agreement == 1


def test_skipped_empty_and_repeated_annotations():
    left, right = (result("choices", [side]) for side in ("left", "right"))
    row = export(
        task(),
        annotation(1, right, at="2026-01-02T00:00:00Z"),  # changed their mind; the export is in no order
        annotation(1, left),
        annotation(2, left, cancelled=True),
        annotation(3),
    )
    record = read(row)
    assert record.wins.tolist() == [[0, 0], [1, 0]] and record.agreement == 1
    prediction = {"result": [left], "model_version": "m"}
    comment = annotation(1, result("textarea", ["nice"]))
    assert reason(export(task(), comment)) == ("no_label", "none of 1 annotations has a verdict or a score")
    audit = Audit(rows=3)
    for annotations in ([], [annotation(2, left, cancelled=True)], [annotation(1), annotation(2)]):
        found = {**export(task(), *annotations), "predictions": [prediction]}
        assert reason(found) == ("not_answered", f"{len(annotations)} annotations, all skipped or empty")
        audit.add("not_answered", "a.json:0", "")
    audit.check("error", 0.0)  # none is a bad row


def test_of_two_annotations_by_one_person_the_one_updated_last_counts():
    """Label Studio writes microseconds where there are some, and the export is in the order of creation."""
    left, right = (result("choices", [side]) for side in ("left", "right"))
    day = "2026-01-01T"
    times = (f"{day}10:00:00Z", f"{day}10:00:00.5Z", f"{day}12:00:00.000001+02:00", f"{day}10:00:01Z")
    for first, second in ((1, 0), (1, 2), (3, 1), (3, 0)):
        kept = annotation(7, left) | {"created_at": times[0], "updated_at": times[first]}
        other = annotation(7, right) | {"created_at": times[1], "updated_at": times[second]}
        for annotations in ((kept, other), (other, kept)):
            assert read(export(task(), *annotations)).wins.tolist() == [[0, 1], [0, 0]]


def test_flat_exports_are_refused(tmp_path):
    """As Label Studio 1.2x writes JSON_MIN and CSV; without the refusal this one would be read as `scored_text`."""
    row = {"id": 1, "prompt": "q", "response": "x", "quality": 4, "annotator": 1, "annotation_id": 2}
    row |= {"created_at": "2026-01-01T10:00:00Z", "updated_at": "2026-01-01T10:00:00Z", "lead_time": 4.2}
    with pytest.raises(ValueError, match=r"a JSON_MIN or CSV export of Label Studio, .*; export as JSON"):
        formats.detect([row])
    path = tmp_path / "project-1.csv"
    path.write_text(",".join(row) + "\n")
    for spec in (path, f"{tmp_path}/*", tmp_path):
        with pytest.raises((ValueError, FileNotFoundError), match="from Label Studio, export as JSON"):
            list(sources.open_source(str(spec)))


def test_ratings_are_means_over_people_on_their_scale():
    (shown,) = labelling.tasks(RECORDS[:1], lowest=0)
    n = [shown["data"]["rmjax"]["order"].index(i) + 1 for i in (0, 1)]  # the places of responses 0 and 1
    stars = lambda name, i, count: result("rating", count, f"{name}_{n[i]}", f"response_{n[i]}")
    row = export(
        shown,
        annotation(1, stars("helpful", 0, 5), stars("helpful", 1, 1), stars("brief", 0, 2)),
        annotation(2, stars("helpful", 0, 4), stars("brief", 1, 0)),  # stars taken back
    )
    record = read(row)
    assert record.attributes["helpful"] == (3.5, 0.0)
    assert record.attributes["brief"][0] == 1 and math.isnan(record.attributes["brief"][1])
    assert not record.wins.any() and math.isnan(record.agreement)  # two attributes, neither of them "score"
    one = read(export(shown, annotation(1, stars("helpful", 0, 2), stars("helpful", 1, 5))))
    assert one.wins.tolist() == [[0, 0], [1, 0]] and one.margin[1, 0] == 3


def test_a_verdict_and_ratings_together():
    numbers = [result("number", x, f"quality_{i}", f"response_{i}") for i, x in ((1, 0), (2, 7.5))]
    record = read(export(task(), annotation(1, result("choices", ["left"]), *numbers)))
    assert record.wins.tolist() == [[0, 1], [0, 0]] and record.attributes == {"quality": (0.0, 7.5)}


def test_a_single_response():
    row = {"data": {"question": "q", "response": "x", "system": "be kind"}}
    record = read(export(row, annotation(1, result("rating", 4, "quality", "response"))))
    assert record.attributes == {"quality": (4.0,)}
    assert list(record.conversations[0]) == [{"role": "system", "content": "be kind"}, user("q"), assistant("x")]


def test_what_cannot_be_understood_is_a_counted_row():
    left = annotation(1, result("choices", ["left"]))
    assert reason(export({"data": {"response_1": "x", "response_2": "y"}}, left))[1].startswith("data has no prompt")
    assert (
        "found prompt, output, response"
        in reason(export({"data": {"prompt": "q", "output": "x", "response": "y"}}, left))[1]
    )
    assert "found prompt, text_a" in reason(export({"data": {"prompt": "q", "text_a": "x"}}, left))[1]
    assert (
        "several verdicts (safer, nicer)"
        in reason(export(task(), annotation(1, *(result("choices", ["left"], name) for name in ("safer", "nicer")))))[1]
    )
    assert "which of 2 responses" in reason(export(task(), annotation(1, result("rating", 3, "stars", "text"))))[1]
    assert "verdict on 3 responses" in reason(export(task(response_3="z"), left))[1]
    assert reason(export(task(response_2=" "), left))[0] == "empty_response"
    assert reason(export(task(response_2="x"), left))[0] == "identical_responses"


def test_agreement_of_an_export(tmp_path):
    (shown,) = labelling.tasks(RECORDS[:1])
    rows = [
        export(shown, *(annotation(p, choose(shown, best)) for p, best in enumerate(b)))
        for b in [(0, 0), (1, 1), (0, 1)]
    ]
    (tmp_path / "export.json").write_text(json.dumps(rows))
    (found,) = agreement.summaries(str(tmp_path / "export.json"))
    # Observed 2/3; by chance 2/3 * 1/3 + 1/3 * 2/3 = 4/9.
    assert found.cohen == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert (found.items, found.people) == (3, 2)
    ratings = [result("rating", x, f"quality_{i}", f"response_{i}") for i, x in ((1, 2), (2, 4))]
    rows = [export(task(), annotation(1, *ratings), annotation(2, *ratings))]
    (tmp_path / "export.json").write_text(json.dumps(rows))
    (found,) = agreement.summaries(str(tmp_path / "export.json"))
    assert (found.question, found.items, found.alpha, found.cohen) == ("quality", 2, 1.0, 1.0)


def test_votes_survive_the_round_trip(small_sets):
    raw = [row for _, row in sources.open_source(f"{small_sets}/votes.json")]
    layout = formats.detect(raw)
    before, votes = [], []
    for i, row in enumerate(raw):
        try:
            (record,) = layout.read(row, source="votes", where=f"votes.json:{i}")
        except BadRow:
            continue
        before.append(record)
        votes.append([row[f"annotator{n}"] for n in (1, 2, 3)])
    assert len(before) == 110
    tasks = list(labelling.tasks(before))
    verdict = lambda task, vote: choose(task, vote - 1) if vote else result("choices", ["tie"])
    for record, task, given in zip(before, tasks, votes):
        after = read(export(task, *(annotation(n, verdict(task, vote)) for n, vote in enumerate(given))))
        assert (after.conversations, after.row, after.source) == (record.conversations, record.row, record.source)
        np.testing.assert_array_equal(after.wins, record.wins)
        np.testing.assert_array_equal(after.ties, record.ties)
        assert after.agreement == record.agreement

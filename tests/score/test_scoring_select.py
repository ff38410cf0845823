"""What is made of scored rows: lists, the best of N, pairs, labels by scores, what margins leave; with counts."""

import dataclasses
import json
import math
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scoring_fork import Model

from rmjax.data.reading import records
from rmjax.inference import contract
from rmjax.jobs import job
from rmjax.score import __main__ as score
from rmjax.score import making, rows
from rmjax.score.making import Options


@pytest.fixture
def model(monkeypatch, tmp_path_factory):
    """The command finds this one, in an empty directory."""
    made = Model()
    made.directory = tmp_path_factory.mktemp("empty")
    monkeypatch.setattr("rmjax.inference.reward_model.load_checked", lambda *_args, **_kwargs: made)
    monkeypatch.setattr(job, "CHUNK", 4)
    return made


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(model, source, output, normalize=False, **options):
    told = {"dtype": "float32", "options": Options(**options), "normalize": normalize}
    return score.run(str(model.directory), str(source), output, **told)


def answers(*numbers):
    return [f"answer {n}" for n in numbers]


PROMPTS = [
    {"prompt": "a", "responses": answers(1, 5, 3), "note": "x"},
    {"prompt": "b", "responses": answers(2, 2), "note": "y"},
    {"prompt": "c", "responses": answers(4), "note": "z"},
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_responses_of_a_prompt_get_a_list(ending, model, tmp_path):
    output = tmp_path / f"out.{ending}"
    assert run(model, write(tmp_path / "in.jsonl", PROMPTS), output) == (3, {"rows": 3})
    assert [row["scores"] for row in read(output)] == [[1, 5, 3], [2, 2], [4]]
    assert [row["note"] for row in read(output)] == ["x", "y", "z"] and read(output)[0]["responses"] == answers(1, 5, 3)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_best_of_n(ending, model, tmp_path):
    output = tmp_path / f"out.{ending}"
    run(model, write(tmp_path / "in.jsonl", PROMPTS), output, best_of_n=True)
    assert read(output) == [
        {"prompt": "a", "note": "x", "response": "answer 5", "score": 5.0},
        {"prompt": "b", "note": "y", "response": "answer 2", "score": 2.0},
        {"prompt": "c", "note": "z", "response": "answer 4", "score": 4.0},
    ]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_pairs_of_responses_and_what_is_dropped(ending, model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / f"out.{ending}"
    count, told = run(model, source, output, pairs="best_worst")
    assert (count, told) == (3, {"rows": 1, "dropped: tie": 1, "dropped: single response": 1})
    pair = {"chosen": "answer 5", "rejected": "answer 1", "chosen_score": 5.0, "rejected_score": 1.0, "margin": 4.0}
    assert read(output) == [{"prompt": "a", "note": "x", **pair}]
    _, told = run(model, source, output, pairs="all", tie_threshold=1.9, max_margin=2.0)
    assert told == {"rows": 2, "dropped: tie": 1, "dropped: margin": 1, "dropped: single response": 1}
    assert [(row["chosen"], row["rejected"]) for row in read(output)] == [tuple(answers(5, 3)), tuple(answers(3, 1))]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_pairs_after_turns_are_in_a_format_that_training_reads(ending, model, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "responses": row["responses"]} for row in PROMPTS]
    output = tmp_path / f"out.{ending}"
    run(model, write(tmp_path / "in.jsonl", rows), output, pairs="all")
    found = list(records(str(output)))
    assert [c[-1]["content"] for c in found[0].conversations] == answers(5, 3) and len(found) == 3
    assert found[0].conversations[0][0]["content"] == "a" and found[0].margin[0, 1] == 2


LABELLED = [
    {"prompt": "a", "chosen": "answer 5", "rejected": "answer 1"},
    {"prompt": "b", "chosen": "answer 1", "rejected": "answer 3"},
    {"prompt": "c", "chosen": "answer 2", "rejected": "answer 2"},
    {"prompt": "d", "chosen": "answer 9", "rejected": "answer 8"},
]


REPEATED = [
    {"prompt": "a", "responses": answers(2, 2, 2)},
    {"prompt": "b", "responses": answers(2, 1, 2, 1)},
    {"prompt": "c", "responses": answers(4)},
]


def test_a_response_is_never_paired_with_itself(model, tmp_path, monkeypatch):
    """Whatever scores it gets: places in a row move them."""
    moved = iter(range(100))
    given = model.values
    monkeypatch.setattr(model, "values", lambda c: {"score": given(c)["score"] + [1e-6 * next(moved) for _ in c]})
    source, output = write(tmp_path / "in.jsonl", REPEATED), tmp_path / "out.jsonl"
    for pairs in ("best_worst", "all"):
        _, told = run(model, source, output, pairs=pairs)
        assert told == {"rows": 1, "dropped: tie": 1, "repeated responses": 2, "dropped: single response": 1}
        assert [(row["chosen"], row["rejected"]) for row in read(output)] == [tuple(answers(2, 1))]
    sides = [{"prompt": "a", "chosen": "answer 3", "rejected": "answer 3"}]
    _, told = run(model, write(tmp_path / "pairs.jsonl", sides), output, relabel=True)
    assert told == {"rows": 0, "dropped: tie": 1}


def test_scores_that_differ_by_less_than_the_computation_can_tell_are_equal(model, tmp_path, monkeypatch):
    model.resolution = 0.5
    close = [{"prompt": "a", "responses": answers(1, 5.2, 5.6, 5.0)}]
    source, output = write(tmp_path / "in.jsonl", close), tmp_path / "out.jsonl"
    _, told = run(model, source, output, pairs="all")
    assert [(row["chosen"], row["rejected"]) for row in read(output)] == [
        *(tuple(answers(5.6, x)) for x in (5.0, 1)),
        *(tuple(answers(x, 1)) for x in (5.2, 5.0)),
    ]
    assert told == {"rows": 4, "dropped: tie": 2}
    run(model, source, output, best_of_n=True)
    assert read(output)[0]["response"] == "answer 5.2"  # the first of equal ones
    pair = {"prompt": "a", "chosen": "answer 1.2", "rejected": "answer 1.6"}
    _, told = run(model, write(tmp_path / "pairs.jsonl", [pair]), output, relabel=True)
    assert told == {"rows": 0, "dropped: tie": 1}
    run(model, source, output)
    assert read(output)[0]["scores"] == [1, 5.2, 5.6, 5.0]  # as they are
    monkeypatch.setattr(contract, "normalization", lambda terms: (0.0, 10.0))
    _, told = run(model, source, output, normalize=True, pairs="all")
    assert told == {"rows": 4, "dropped: tie": 2}


def test_pairs_are_scored_filtered_and_relabelled(model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", LABELLED), tmp_path / "out.jsonl"
    assert run(model, source, output) == (4, {"rows": 4})
    assert [(row["chosen_score"], row["rejected_score"]) for row in read(output)] == [(5, 1), (1, 3), (2, 2), (9, 8)]
    assert run(model, source, output, min_margin=0.5) == (4, {"rows": 2, "dropped: margin": 2})
    assert [row["prompt"] for row in read(output)] == ["a", "d"]
    _, told = run(model, source, output, relabel=True, tie_threshold=1.0)
    assert told == {"rows": 2, "relabelled": 1, "dropped: tie": 2}
    turned = {"chosen": "answer 3", "rejected": "answer 1", "chosen_score": 3.0, "rejected_score": 1.0, "margin": 2.0}
    assert read(output)[1] == {"prompt": "b", **turned}


def test_whole_conversations_as_pairs(model, tmp_path):
    turn = lambda role, text: {"role": role, "content": text}
    rows = [
        {"chosen": [turn("user", "q"), turn("assistant", "answer 3")], "rejected": [turn("user", "q")]},
        {"prompt": "q", "chosen": [turn("assistant", "answer 3")], "rejected": [turn("assistant", "answer 1")]},
    ]
    rows[0]["rejected"].append(turn("assistant", "answer 4"))
    output = tmp_path / "out.jsonl"
    run(model, write(tmp_path / "in.jsonl", rows), output, relabel=True)
    found = read(output)
    assert found[0]["chosen"][-1]["content"] == "answer 4" and found[1]["margin"] == 2


def test_normalized_scores(model, tmp_path, monkeypatch):
    source, output = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="rewards cannot be normalized: the model has no score contract"):
        run(model, source, output, normalize=True)
    monkeypatch.setattr(contract, "normalization", lambda terms: (1.0, 2.0))
    run(model, source, output, normalize=True)
    assert [row["scores"] for row in read(output)] == [[0, 2, 1], [0.5, 0.5], [1.5]]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (LABELLED, {"best_of_n": True}, "--best_of_n goes with rows with `responses`; the first row has the shape 'pa"),
        (LABELLED, {"pairs": "all"}, "--pairs=all goes with rows with `responses`"),
        (PROMPTS, {"relabel": True}, "--relabel goes with rows with `chosen` and `rejected`"),
        (PROMPTS, {"tie_threshold": 1.0}, "--tie_threshold goes with --pairs or --relabel"),
        (LABELLED, {"tie_threshold": 1.0}, "--tie_threshold goes with --pairs or --relabel"),
        (PROMPTS, {"min_margin": 1.0}, "--min_margin goes with --pairs, or rows with `chosen`"),
        (PROMPTS, {"best_of_n": True, "max_margin": 1.0}, "--max_margin goes with --pairs, or rows"),
        (PROMPTS, {"best_of_n": True, "pairs": "all"}, "give one of them"),
        (PROMPTS, {"pairs": "best"}, "--pairs=best is none of"),
        (LABELLED, {"relabel": True, "tie_threshold": -1.0}, "must be a number that is not negative"),
        (LABELLED, {"relabel": True, "tie_threshold": math.nan}, "must be a number that is not negative"),
        (LABELLED, {"min_margin": 2.0, "max_margin": 1.0}, "is above"),
        ([{**PROMPTS[0], "scores": [1]}], {}, "has a column `scores` already"),
        ([{**PROMPTS[0], "response": "x"}], {"best_of_n": True}, "has a column `response` already"),
        ([{**PROMPTS[0], "chosen": "x"}], {"pairs": "all"}, "has a column `chosen` already"),
        ([{**LABELLED[0], "margin": 3}], {"relabel": True}, "has a column `margin` already"),
        ([{**LABELLED[0], "chosen_score": 3}], {}, "has a column `chosen_score` already"),
        ([{**PROMPTS[0], "responses": ["a", [{"role": "assistant", "content": "b"}]]}], {"pairs": "all"}, "no texts"),
    ],
)
def test_flags_that_do_not_go_with_the_rows_are_refused_before_the_model(rows, options, words, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rmjax.inference.reward_model.load_checked", lambda *_a, **_k: pytest.fail("the model was loaded")
    )
    with pytest.raises(ValueError, match=words):
        score.run(
            "nowhere", str(write(tmp_path / "in.jsonl", rows)), tmp_path / "out.jsonl", options=Options(**options)
        )
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_parquet_columns_are_those_of_what_is_made(model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.parquet"
    run(model, source, output, pairs="all")
    assert pq.read_schema(output).field("margin").type == pa.float64()
    assert pq.read_schema(output).names == [
        *("prompt", "note", "chosen", "rejected", "chosen_score", "rejected_score", "margin")
    ]


def test_other_columns_of_numbers_stay(model, tmp_path):
    rows = [{**row, "gold": [0.5] * len(row["responses"])} for row in PROMPTS]
    source = write(tmp_path / "in.jsonl", rows)
    for options in ({}, {"best_of_n": True}, {"pairs": "all"}):
        run(model, source, tmp_path / "out.parquet", **options)
        run(model, source, tmp_path / "out.jsonl", **options)
        assert read(tmp_path / "out.parquet") == read(tmp_path / "out.jsonl")
        assert read(tmp_path / "out.parquet")[0]["gold"] == [0.5] * 3
    assert run(model, write(source, [{**LABELLED[0], "margin": 3}]), tmp_path / "out.jsonl") == (1, {"rows": 1})


def test_what_is_turned_are_all_columns_of_the_two_sides(model, tmp_path):
    row = {"prompt": "q", "chosen": "answer 1", "rejected": "answer 2", "chosen_model": "a", "rejected_model": "b"}
    run(model, write(tmp_path / "in.jsonl", [{**row, "chosen_by": "ann"}]), tmp_path / "out.jsonl", relabel=True)
    turned = {"chosen": "answer 2", "rejected": "answer 1", "chosen_model": "b", "rejected_model": "a"}
    scores = {"chosen_score": 2.0, "rejected_score": 1.0, "margin": 1.0}
    assert read(tmp_path / "out.jsonl") == [{**row, "chosen_by": "ann", **turned, **scores}]


def test_columns_of_other_names_become_rows_that_training_reads(model, tmp_path):
    output, row = tmp_path / "out.jsonl", {"question": "q", "samples": ["answer 1", "answer 2"]}
    score.run(
        str(model.directory),
        str(write(tmp_path / "in.jsonl", [row])),
        output,
        options=Options(pairs="all"),
        columns="responses=samples",
    )
    (made,) = read(output)
    assert (made["prompt"], made["chosen"], made["rejected"]) == ("q", "answer 2", "answer 1")


def test_labels_of_another_order_do_not_stay(model, tmp_path):
    row = {"prompt": "q", "chosen": "answer 1", "rejected": "answer 2", "preference": 2}
    rated = {**row, "rated_chosen": 1, "rated_rejected": 5}
    run(model, write(tmp_path / "in.jsonl", [rated]), tmp_path / "out.jsonl", relabel=True)
    (made,) = read(tmp_path / "out.jsonl")
    assert made["preference"] is None and (made["rated_chosen"], made["rated_rejected"]) == (5, 1)


@pytest.mark.parametrize("options", [{"relabel": True}, {"min_margin": 0.0}])
def test_pairs_by_scores_are_in_a_format_that_training_reads(options, model, tmp_path):
    rows = [LABELLED[0], LABELLED[1], LABELLED[3], {"prompt": "e", "chosen": "answer 1", "rejected": "an answer 1"}]
    rows.append({"prompt": "f", "chosen": "answer 2", "rejected": "answer 1"})
    output = tmp_path / "out.jsonl"
    run(model, write(tmp_path / "in.jsonl", rows), output, **options)
    found, made = list(records(str(output))), read(output)
    assert len(found) == len(made) == 4  # relabelling drops the tie, the margin the wrong label
    for record, row in zip(found, made, strict=True):
        preferred = int(np.argmax(record.wins.sum(axis=1))) if row["margin"] else 0
        assert record.conversations[preferred][-1]["content"] == row["chosen"]


def test_sides_that_have_the_prompt_already_get_no_second_one(model, tmp_path):
    """As zephyr's and UltraFeedback's files are: `prompt`, and whole conversations."""
    turn = lambda role, text: {"role": role, "content": text}
    prompt = [turn("system", "s"), turn("user", "q")]
    seen = []
    model.values = lambda conversations: seen.extend(conversations) or {"score": np.zeros(len(conversations))}
    made = [
        {"prompt": "q", "chosen": [turn("user", "q"), turn("assistant", "a")], "rejected": [turn("assistant", "b")]},
        {"prompt": prompt, "chosen": [*prompt, turn("assistant", "a")], "rejected": [turn("assistant", "b")]},
    ]
    source = write(tmp_path / "in.jsonl", made)
    run(model, source, tmp_path / "out.jsonl")
    wanted = [[turn("user", "q")]] * 2 + [prompt] * 2
    assert [one[:-1] for one in seen] == wanted
    assert [[dict(m) for m in c] for r in records(str(source)) for c in r.conversations] == seen


def test_scores_that_are_not_finite_are_null_and_choose_nothing(model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    real = model.values
    model.values = lambda asked: {"score": np.where(real(asked)["score"] == 5, np.nan, real(asked)["score"])}
    assert run(model, source, output) == (3, {"rows": 3, "without a finite score": 1})
    assert [row["scores"] for row in read(output)] == [[1, None, 3], [2, 2], [4]]
    for options in ({"best_of_n": True}, {"pairs": "all", "tie_threshold": 0.0}):
        _, told = run(model, source, output, **options)
        assert told["without a finite score"] == 1 and "a" not in [row["prompt"] for row in read(output)]
    model.values = lambda asked: {"score": np.full(len(asked), np.inf)}
    assert run(model, write(source, LABELLED), output, relabel=True) == (4, {"rows": 0, "without a finite score": 4})


# Attributes


@pytest.fixture
def rated(model, monkeypatch):
    """The model says how long an answer is, too."""
    kind = dataclasses.replace(rows.SCORING, names=["length", "score"])
    monkeypatch.setattr("rmjax.score.survey.kind_of", lambda *_: kind)
    real = model.values
    model.values = lambda asked: {"length": np.full(len(asked), 8.0), **real(asked)}
    return model


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_attributes_go_with_their_responses(ending, rated, tmp_path, monkeypatch):
    monkeypatch.setattr(contract, "normalization", lambda terms: (1.0, 2.0))
    output = tmp_path / f"out.{ending}"
    source = write(tmp_path / "in.jsonl", PROMPTS[:1])
    run(rated, source, output, normalize=True)  # rewards alone; attributes have their scales
    assert read(output) == [{**PROMPTS[0], "length": [8, 8, 8], "scores": [0, 2, 1]}]
    run(rated, source, output, best_of_n=True)
    assert read(output) == [{"prompt": "a", "note": "x", "response": "answer 5", "length": 8.0, "score": 5.0}]
    run(rated, source, output, pairs="best_worst")
    both = {"chosen": "answer 5", "rejected": "answer 1", "chosen_length": 8.0, "rejected_length": 8.0}
    told = {"chosen_score": 5.0, "rejected_score": 1.0, "margin": 4.0}
    assert read(output) == [{"prompt": "a", "note": "x", **both, **told}]
    run(rated, write(source, LABELLED[1:2]), output, relabel=True)
    assert read(output)[0]["chosen_length"] == 8.0 and read(output)[0]["margin"] == 2.0


EMPTY = [
    {"prompt": "a", "responses": ["answer 1", "", None, "answer 3", "answer 2"], "note": "x"},
    {"prompt": "b", "responses": None, "note": "y"},
    {"prompt": "c", "responses": [" ", "answer 4"], "note": "z"},
    {"prompt": "d", "responses": [], "note": "u"},
    {"prompt": "e", "responses": ["answer 5", "answer 6"], "note": "v"},
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_an_empty_response_has_no_score_and_ends_nothing(ending, model, tmp_path, capsys):
    source, output, empty = write(tmp_path / "in.jsonl", EMPTY), tmp_path / f"out.{ending}", {
        "without a score: empty_response": 5
    }  # fmt: skip
    assert run(model, source, output) == (5, {"rows": 5, **empty})
    assert [row["scores"] for row in read(output)] == [[1, None, None, 3, 2], None, [None, 4], None, [5, 6]]
    assert [row["responses"] for row in read(output)] == [row["responses"] for row in EMPTY]
    assert (
        "no score: empty_response 5 (the first is in.jsonl:0: the last assistant turn has no" in capsys.readouterr().out
    )
    assert run(model, source, output, best_of_n=True) == (5, {"rows": 3, **empty})
    assert [(row["note"], row["response"], row["score"]) for row in read(output)] == [
        ("x", "answer 3", 3),
        ("z", "answer 4", 4),
        ("v", "answer 6", 6),
    ]
    _, told = run(model, source, output, pairs="best_worst")
    assert told == {"rows": 2, "dropped: single response": 1, **empty}
    assert [(row["chosen_score"], row["rejected_score"]) for row in read(output)] == [(3, 1), (6, 5)]


@pytest.mark.parametrize("nothing", [None, "", " \n"])
def test_a_null_side_has_no_score_and_chooses_nothing(nothing, model, tmp_path):
    given = [LABELLED[1], {**LABELLED[0], "rejected": nothing}, {**LABELLED[3], "chosen": nothing}]
    source, output, empty = (
        write(tmp_path / "in.jsonl", given),
        tmp_path / "out.jsonl",
        "without a score: empty_response",
    )
    assert run(model, source, output) == (3, {"rows": 3, empty: 2})
    assert [(row["chosen_score"], row["rejected_score"]) for row in read(output)] == [(1, 3), (5, None), (None, 8)]
    assert run(model, source, output, relabel=True) == (3, {"rows": 1, "relabelled": 1, empty: 2})
    one = [{"prompt": "q", "response": "answer 1"}, {"prompt": "q", "response": nothing}]
    assert run(model, write(source, one), output) == (2, {"rows": 2, empty: 1})
    assert [row["score"] for row in read(output)] == [1, None]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": nothing}]
    assert run(model, write(source, [{"messages": turns}] * 5), output) == (5, {"rows": 5, empty: 5})
    assert [row["score"] for row in read(output)] == [None] * 5


def test_one_line_says_what_was_dropped(model, tmp_path, capsys):
    source, output = write(tmp_path / "in.jsonl", LABELLED), tmp_path / "out.jsonl"
    told = run(model, source, output, relabel=True, tie_threshold=1.0, max_margin=3.0)
    text = "4 rows scored, 1 written to o; dropped: margin 1; dropped: tie 2; relabelled 1"
    assert score._summary(*told, "o") == text
    assert score._summary(7, {"rows": 7}, "o") == "7 scores in o"
    assert [
        making.made_columns({"scores": pa.list_(pa.float64())}, Options(best_of_n=x)).keys() for x in (False, True)
    ] == [
        {"scores"},
        {"response", "score"},
    ]

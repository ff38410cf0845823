"""Files scored with judges that write."""

import json
from types import SimpleNamespace

import pytest
import transformers
from planted_judge import Planted

from rmjax.inference.generation import GenerativeModel
from rmjax.judging import verdicts
from rmjax.judging.writing import Writing
from rmjax.score import __main__ as score
from rmjax.score import judgements, survey
from rmjax.score.judgements import Sampling
from rmjax.score.making import Options

SAMPLING = Sampling(4, 100)
PAIR = Writing(target="pair", template=verdicts.load_template("", "judge_pair"))
RATING = Writing(target="score", template=verdicts.load_template("", "judge_score"), scale=(0, 4))


@pytest.fixture
def judging(monkeypatch, tokenizer_dir, tmp_path):
    """Scores rows with a planted judge of a task: what is written, and the counts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))

    def run(task, judge, rows, **options):
        model = Planted(tokenizer, judge, over_long="endless")
        model.inference = SimpleNamespace(work=SimpleNamespace(computed=0, unshared=0))
        monkeypatch.setattr(survey, "kind_of", lambda *_: judgements.kind_of(task, SAMPLING))
        monkeypatch.setattr("rmjax.inference.reward_model.load_checked", lambda *_, **__: model)
        monkeypatch.setattr(GenerativeModel, "of", lambda judge: judge)
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        told, more = tmp_path / "told.json", {"sampling": SAMPLING, "options": Options(**options)}
        counts = score.run(str(tmp_path), str(source), output, summary=told, **more)[1]
        assert json.loads(told.read_text())["tokens_computed"] is None  # they are not counted, which is not none
        return [json.loads(line) for line in output.read_text().splitlines()], counts

    return run


def test_pairs_get_the_shares_of_readable_verdicts_in_both_orders(judging):
    def judge(text, k):
        if k == 0 or "riddle" in text:
            return "<better>C</better>"
        return "<better>A</better>" if text.find("long") < text.find("short") or k == 1 else "<better>B</better>"

    rows = [
        {"prompt": "q", "response_a": "long", "response_b": "short"},
        {"prompt": "q", "chosen": "short", "rejected": "long"},
        {"prompt": "riddle", "response_a": "long", "response_b": "short"},
    ]
    (first,), _ = judging(PAIR, judge, rows[:1])
    assert (first["A"], first["B"], first["tie"]) == pytest.approx((5 / 6, 1 / 6, 0)) and first["unreadable"] == 0.25
    (second,), _ = judging(PAIR, judge, rows[1:2])
    assert (second["A"], second["B"]) == pytest.approx((1 / 6, 5 / 6))
    (third,), _ = judging(PAIR, judge, rows[2:])
    assert third["A"] is third["B"] is third["tie"] is None and third["unreadable"] == 1


def test_a_pair_that_there_is_no_room_for_has_no_score_and_is_counted(judging):
    rows = [{"prompt": prompt, "response_a": "long", "response_b": "short"} for prompt in ("q", "endless")]
    (first, second), counts = judging(PAIR, lambda text, k: "<better>A</better>", rows)
    assert first["A"] == 0.5 and second["A"] is second["B"] is second["tie"] is second["unreadable"] is None
    assert counts["without a score: question_too_long"] == 1


def rate(text, k):
    good = text.count("good")
    return "no number" if k == 3 or good == 3 else f"<score>{min(4, good + (k == 2))}</score>"


def test_responses_get_the_mean_of_readable_ratings(judging):
    rows = [{"prompt": "q", "responses": ["good", "bad", "good good good", None]}]
    (row,), _ = judging(RATING, rate, rows)
    assert row["scores"] == [pytest.approx(4 / 3), pytest.approx(1 / 3), None, None]
    assert row["unreadable"] == [0.25, 0.25, 1.0, None]
    (best,), _ = judging(RATING, rate, rows, best_of_n=True)
    assert best["response"] == "good" and best["score"] == pytest.approx(4 / 3) and best["unreadable"] == 0.25


def test_a_response_that_there_is_no_room_for_has_no_score(judging):
    (row,), counts = judging(RATING, rate, [{"prompt": "q", "responses": ["good", "endless", "bad"]}])
    assert row["scores"] == [pytest.approx(4 / 3), None, pytest.approx(1 / 3)]
    assert row["unreadable"] == [0.25, None, 0.25] and counts["without a score: question_too_long"] == 1


def test_an_unreadable_rating_is_never_a_score_of_a_pair(judging):
    rows = [{"prompt": "q", "chosen": x, "rejected": "bad"} for x in ("good good good", "good")]
    made, _ = judging(RATING, rate, rows, relabel=True)
    assert [row["chosen"] for row in made] == ["good"]


def test_models_that_do_not_write_are_not_sampled(tmp_path):
    with pytest.raises(ValueError, match="--samples is for judges that write"):
        survey.kind_of(str(tmp_path), SAMPLING)

"""Agreement of annotators, against published worked examples, scikit-learn and a paper's figures for real votes."""

import itertools
import math
import sys

import numpy as np
import pytest

from rmjax import suggestions
from rmjax.data import agreement, sources

# Fleiss (1971), "Measuring nominal scale agreement among many raters", table 1: six psychiatrists put 30 patients
# into five categories; printed there: kappa 0.430.
PSYCHIATRISTS = """
00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006
"""
# Krippendorff (2011), "Computing Krippendorff's alpha-reliability", section C: four observers, twelve units, missing
# answers; printed there: nominal 0.743, ordinal 0.815, interval 0.849, ratio 0.797.
OBSERVERS = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]


def test_fleiss_kappa_of_the_psychiatrists():
    counts = np.array([list(map(int, patient)) for patient in PSYCHIATRISTS.split()])
    assert counts.shape == (30, 5) and (counts.sum(1) == 6).all()
    np.testing.assert_array_equal(np.round(counts.mean(0) / 6, 3), [0.144, 0.144, 0.167, 0.306, 0.239])  # as printed
    assert round(agreement.fleiss_kappa(counts), 3) == 0.430


@pytest.mark.parametrize(("level", "printed"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_alpha_of_his_observers(level, printed):
    ratings = [[math.nan if answer == "." else float(answer) for answer in row.split()] for row in OBSERVERS]
    assert round(agreement.krippendorff_alpha(ratings, level), 3) == printed


def test_cohens_kappa_by_hand():
    # Of 50 items 20 twice yes, 15 twice no: 0.7 observed; 0.5 * 0.6 + 0.5 * 0.4 = 0.5 by chance.
    first = [1] * 25 + [0] * 25
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert agreement.cohen_kappa(first, second, quadratic=False) == pytest.approx((0.7 - 0.5) / (1 - 0.5))


@pytest.mark.parametrize("quadratic", [False, True])
def test_cohens_kappa_is_that_of_scikit_learn(quadratic):
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    first = rng.integers(0, 5, 200)
    second = np.clip(first + rng.integers(-1, 2, 200), 0, 4)
    expected = cohen_kappa_score(first, second, weights="quadratic" if quadratic else None)
    assert agreement.cohen_kappa(first, second, quadratic=quadratic) == pytest.approx(expected, abs=1e-12)


def test_quadratic_weights_are_of_the_answers_not_of_their_order():
    from sklearn.metrics import cohen_kappa_score

    # 1 and 5 are 16 times as far apart as 1 and 2, also where nobody says 3 or 4.
    first, second = [1, 1, 2, 5, 5, 2], [1, 2, 2, 5, 1, 2]
    expected = cohen_kappa_score(first, second, weights="quadratic", labels=[1, 2, 3, 4, 5])
    assert agreement.cohen_kappa(first, second, quadratic=True) == pytest.approx(expected, abs=1e-12)
    assert expected != pytest.approx(cohen_kappa_score(first, second, weights="quadratic"), abs=0.01)


def test_where_chance_explains_all_there_is_no_figure():
    assert math.isnan(agreement.cohen_kappa([1, 1], [1, 1], quadratic=False))
    assert math.isnan(agreement.fleiss_kappa([[2, 0], [2, 0]]))
    assert math.isnan(agreement.krippendorff_alpha([[1, 2], [math.nan, math.nan]], "nominal"))


def test_a_summary_of_three_people_with_gaps():
    from sklearn.metrics import cohen_kappa_score

    items = [{"a": 1, "b": 1}, {"a": 2, "b": 2, "c": 2}, {"b": 1, "c": 2}, {"a": 0, "c": 0}, {"a": 1}]
    found = agreement.summarise("preference", items)
    assert (found.items, found.people) == (4, 3)
    # a and b agree on both their items, a and c on both theirs, b and c on one of two.
    of_two = cohen_kappa_score([2, 1], [2, 2])
    assert found.cohen == pytest.approx((1 + 1 + of_two) / 3)
    # Three items have two answers: (1, 1), (1, 2), (0, 0). Observed 2/3; by chance (2/6)^2 + (3/6)^2 + (1/6)^2.
    chance = (4 + 9 + 1) / 36
    assert found.fleiss == pytest.approx((2 / 3 - chance) / (1 - chance))
    # Nominal alpha: of 9 answers, 1 - 8 * (disagreeing pairs, weighted) / (sum of products of counts).
    # Values: 0 twice, 1 three times, 2 four times; only item 3 disagrees: 2 ordered pairs over (2 - 1).
    assert found.alpha == pytest.approx(1 - 8 * 2 / (81 - 4 - 9 - 16))
    assert "(4 items, 3 annotators)" in str(found)


def test_votes_in_columns_are_those_of_scikit_learn(small_sets):
    from sklearn.metrics import cohen_kappa_score

    path = f"{small_sets}/votes.json"
    votes = [[row[f"annotator{i}"] for _, row in sources.open_source(path)] for i in (1, 2, 3)]
    expected = np.mean([cohen_kappa_score(*pair) for pair in itertools.combinations(votes, 2)])
    (found,) = agreement.summaries(path)
    assert (found.question, found.items, found.people) == ("preference", 120, 3)
    assert found.cohen == pytest.approx(expected) and 0.2 < expected < 0.9
    assert found.fleiss == pytest.approx(expected, abs=0.05) and found.alpha == pytest.approx(found.fleiss, abs=0.01)


def test_pandalm_has_the_agreement_that_its_paper_prints(public_file):
    # Wang et al. (2023), "PandaLM", arXiv:2306.05087: Cohen's kappa of the three pairs of annotators.
    path = str(public_file("pandalm/testset-v1.json"))
    votes = np.array([[row[f"annotator{i}"] for i in (1, 2, 3)] for _, row in sources.open_source(path)]).T
    kappas = [agreement.cohen_kappa(votes[i], votes[j], quadratic=False) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert [round(kappa, 2) for kappa in kappas] == [0.85, 0.88, 0.86]
    (found,) = agreement.summaries(path)
    assert (found.question, found.items, found.people) == ("preference", 999, 3)
    assert found.cohen == pytest.approx(np.mean(kappas))
    assert round(found.fleiss, 3) == round(found.alpha, 3) == 0.864


def test_sources_without_annotators_have_no_agreement(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    assert agreement.lines(str(tmp_path / "a.jsonl")) == []


def test_what_is_missing_is_named(monkeypatch, small_sets):
    monkeypatch.setitem(sys.modules, "krippendorff", None)
    with pytest.raises(ImportError, match=r"needs krippendorff: pip install 'krippendorff"):
        agreement.krippendorff_alpha([[1, 2], [1, 1]], "nominal")
    assert agreement.lines(f"{small_sets}/votes.json") == [
        f"agreement of annotators needs krippendorff: {suggestions.install('agreement')}"
    ]

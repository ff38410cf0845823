"""What the audit measures, against scipy and loops over the groups; and its page, which needs nothing else."""

import html.parser
import itertools
import json
import re

import numpy as np
import pytest

from rmjax.batches import measure, packing, token_cache
from rmjax.batches.chat import Chat
from rmjax.batches.tasks import Attributes, Preferences, Steps
from rmjax.report import audit as audit_report
from rmjax.report import drawing
from rmjax.report.audit_command import DataAudit
from rmjax.runtime import files

PLOTS = {  # a text in a plot of each kind of labels
    "rankings": ("tokens", "Fill of", "Tokens to compute", "Comparisons", "Is the longer one preferred?"),
    "scores": ("tokens", "Fill of", "Tokens to compute", "Style", "characters of the response"),
    "steps": ("tokens", "Fill of", "Tokens to compute", "First wrong step", "all steps right"),
}


@pytest.fixture(scope="module")
def build(tokenizer_dir, tmp_path_factory):
    """Builds groups of rows in this process."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))

    def call(rows, task, **kwargs):
        directory = tmp_path_factory.mktemp("audit")
        path = directory / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        kwargs = {"workers": 0, "cache_dir": directory / "cache", "max_bad_fraction": 1.0, **kwargs}
        return token_cache.build(str(path), Chat(tokenizer), task, **kwargs)

    return call


def words(rng, n):
    return " ".join(rng.choice(["tree", "plant", "answer", "be", "first"], n))


@pytest.fixture(scope="module")
def rankings(build):
    """60 groups of 2 to 4 responses, ranked with ties; two rows repeat, one of them contradicting."""
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        k = int(rng.integers(2, 5))
        responses = [f"{j} {words(rng, int(rng.integers(1, 30)))}" for j in range(k)]
        rows.append({"prompt": f"question {i}", "responses": responses, "ranks": rng.integers(1, 4, k).tolist()})
    rows[0]["ranks"] = [1, 2, 3, 4][: len(rows[0]["ranks"])]
    return build([*rows, rows[0], {**rows[0], "ranks": rows[0]["ranks"][::-1]}], Preferences("keep"))


@pytest.fixture(scope="module")
def scores(build):
    """120 responses: `help` grows with the length, `style` does not, and is missing in every third."""
    rng, rows = np.random.default_rng(1), []
    for i in range(120):
        n = int(rng.integers(1, 40))
        style = None if i % 3 == 0 else int(rng.integers(0, 5))
        rows.append(
            {"prompt": f"q {i}", "response": words(rng, n), "help": n // 10 + int(rng.integers(0, 2)), "style": style}
        )
    return build(rows, Attributes(("help", "style")))


@pytest.fixture(scope="module")
def steps(build):
    """Solutions of 1 to 5 steps; the labels of each are kept in `expected`."""
    rng, rows = np.random.default_rng(2), []
    for i in range(80):
        n = int(rng.integers(1, 6))
        labels = [None if rng.random() < 0.1 else bool(rng.random() < 0.7) for _ in range(n)]
        labels = [True] if not any(x is not None for x in labels) else labels
        rows.append(
            {
                "prompt": f"problem {i}",
                "completions": [f"{j} {words(rng, 3)}" for j in range(len(labels))],
                "labels": labels,
            }
        )
    groups = build(rows, Steps())
    return groups, [row["labels"] for row in rows]


def pairs_of(groups):
    """(tokens of i, tokens of j, wins, ties, margin) of every pair i < j, one group at a time."""
    for g in range(len(groups)):
        group = groups.group(g)
        sizes = [len(tokens) for tokens in group.tree.sequences()]
        for i, j in itertools.combinations(range(len(sizes)), 2):
            yield (
                sizes[i],
                sizes[j],
                group.labels["wins"][i, j] - group.labels["wins"][j, i],
                group.labels["ties"][i, j],
            )


def test_preferences_are_those_of_the_groups(rankings):
    found = measure.measure(rankings)
    pairs = list(pairs_of(rankings))
    counts = found["labels"]["comparisons"]
    assert counts["preferred"] == sum(wins != 0 for *_, wins, _ in pairs) > 50
    assert counts["tie"] == sum(tie > 0 for *_, tie in pairs) > 10
    assert counts["soft"] == counts["not compared"] == 0
    decided = [(i - j, wins > 0) for i, j, wins, _ in pairs if wins]
    expected = np.mean([0.5 if d == 0 else (d > 0) == won for d, won in decided])
    assert found["length"]["auc"] == pytest.approx(expected, abs=1e-6)
    curve = found["length"]["curve"]
    assert sum(curve["counts"]) == counts["preferred"]
    assert np.average(curve["mean"], weights=curve["counts"]) == pytest.approx(found["length"]["auc"], abs=1e-6)


def test_response_tokens_are_the_lengths_of_the_sequences(rankings, steps):
    for groups in (rankings, steps[0], rankings.select([5, 3, 17])):
        flat, start = measure.response_tokens(groups)
        for g in range(len(groups)):
            alone = [len(tokens) for tokens in groups.group(g).tree.sequences()]
            assert flat[start[g] : start[g + 1]].tolist() == alone


def test_repeats_and_contradictions_name_their_rows(rankings):
    found = measure.measure(rankings)
    assert found["repeated"]["groups"] == 2 and found["contradicting"]["sets"] == 1
    assert found["repeated"]["examples"] == [["rows.jsonl:0", "rows.jsonl:60"], ["rows.jsonl:60", "rows.jsonl:61"]]
    assert found["contradicting"]["examples"] == [["rows.jsonl:60", "rows.jsonl:61"]]
    (problem,) = [p for p in audit_report.problems(measure.report({"data": rankings})) if "contradicting" in p]
    assert "rows.jsonl:60 and rows.jsonl:61" in problem


def test_margins_soft_labels_and_agreement(build):
    row = lambda i, **more: {"prompt": f"q {i}", "chosen": "yes", "rejected": "no", **more}
    groups = build(
        [row(0, margin=2), row(1, margin=2), row(2, margin=1), row(3, preference=0.75), row(4)], Preferences()
    )
    labels = measure.measure(groups)["labels"]
    assert labels["comparisons"] == {"preferred": 4, "soft": 1, "tie": 0, "not compared": 0}
    assert labels["margins"] == {"values": [1.0, 2.0], "counts": [1, 2]}
    assert labels["soft"] == {"values": [0.75], "counts": [1]} and "agreement" not in labels


def test_attributes_against_scipy(scores):
    import scipy.stats

    found = measure.measure(scores, names=("help", "style"))
    value = np.array([scores.group(i).labels["value"][0] for i in range(len(scores))])
    mask = np.array([scores.group(i).labels["mask"][0] for i in range(len(scores))]) > 0
    characters = scores.column("characters")[0]
    for a, name in enumerate(("help", "style")):
        here, x = mask[:, a], found["labels"]["attributes"][name]
        assert (x["given"], x["missing"]) == (here.sum(), (~here).sum())
        assert (x["mean"], x["sd"]) == pytest.approx((value[here, a].mean(), value[here, a].std()), abs=1e-5)
        assert dict(zip(x["values"], x["counts"])) == {
            v: (value[here, a] == v).sum() for v in np.unique(value[here, a])
        }
        expected = scipy.stats.spearmanr(characters[here], value[here, a]).statistic
        assert found["length"]["attributes"][name]["spearman"] == pytest.approx(expected, abs=1e-9)
    rank = found["length"]["attributes"]["help"]["spearman"]
    said = f"data: help follows the length, with a rank correlation of {rank:+.2f}"
    assert audit_report.problems(measure.report({"data": scores}, names=("help", "style"))) == [said]


def test_steps_are_those_of_the_rows(steps):
    import scipy.stats

    groups, labels = steps
    found = measure.measure(groups)["labels"]
    judged = [x for row in labels for x in row if x is not None]
    assert (found["judged"], found["right"]) == (len(judged), pytest.approx(np.mean(judged)))
    assert found["not_judged"] == sum(x is None for row in labels for x in row) > 0
    first = [row.index(False) + 1 if False in row else 0 for row in labels]
    assert dict(zip(found["first_error"]["values"], found["first_error"]["counts"])) == {
        x: first.count(x) for x in set(first)
    }
    lengths = [len(row) for row in labels]
    assert dict(zip(found["steps"]["values"], found["steps"]["counts"])) == {x: lengths.count(x) for x in set(lengths)}
    characters = groups.column("characters")[0]
    expected = scipy.stats.spearmanr(characters, np.array(first) == 0).statistic
    assert measure.measure(groups)["length"]["attributes"]["all steps right"]["spearman"] == pytest.approx(expected)


def test_filling_is_that_of_the_rows(rankings):
    plan = packing.make_plan(rankings.lengths, rankings.ends, row_tokens=512, rows_per_step=2, epochs=2, window=16)
    found = measure.filling(rankings, plan)
    rows = [row for step in range(plan.epoch_steps[0]) for row in plan.rows(step)]
    used = np.array([rankings.lengths[row].sum() for row in rows])
    assert (found["rows"], found["groups"], found["tokens"]) == (len(rows), len(rankings), rankings.lengths.sum())
    assert found["fill"] == pytest.approx(used.sum() / (512 * len(rows)))
    assert found["row_fill"]["counts"] == np.histogram(used / 512, 50, (0, 1))[0].tolist()


def test_histograms_hold_every_value_and_equally_many_whole_numbers():
    rng = np.random.default_rng(0)
    for high in (25, 41, 97, 4096):
        values = rng.integers(0, high, 3000)
        found = measure.histogram(values, few=0)
        widths = np.unique(np.diff(found["edges"]))
        assert sum(found["counts"]) == 3000 and len(widths) == 1 and widths[0] == int(widths[0])
        assert len(found["counts"]) <= measure.BINS
    assert sum(measure.histogram(rng.normal(size=500))["counts"]) == 500


def test_a_report_is_json_and_the_same_for_a_selection_read_in_another_order(rankings, tmp_path):
    report = measure.report({"training": rankings, "validation": rankings.select(range(10))})
    files.write_json(tmp_path / "audit.json", report)
    assert json.loads((tmp_path / "audit.json").read_text()) == json.loads(json.dumps(report))
    assert list(report["reading"]) == ["training"] and report["shared"]["validation"]["prompts"] == 10
    shuffled = measure.measure(rankings.select(np.random.default_rng(0).permutation(len(rankings))))
    for key in ("trees", "labels", "responses", "sharing"):
        assert shuffled[key] == report["sets"]["training"][key]


# ----------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """Collects what a page would load, the text of its plots, and the marks that carry data."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.open, self.plots = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.loads += [
            v for k, v in values.items() if k in ("src", "href", "xlink:href", "data") and not v.startswith("#")
        ]
        if tag == "svg":
            self.plots.append({"says": values["aria-label"], "texts": [], "marks": 0})
        if tag == "path" and re.search("|".join(drawing.DATA), values.get("style", "")):
            self.plots[-1]["marks"] += 1
        if tag not in ("meta", "br", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text):
        if self.open and self.open[-1] == "text":
            self.plots[-1]["texts"].append(text)


@pytest.mark.parametrize("kind", ["rankings", "scores", "steps"])
def test_the_page_loads_nothing_and_every_plot_has_data(kind, request):
    groups = request.getfixturevalue(kind)
    groups = groups[0] if kind == "steps" else groups
    plan = packing.make_plan(groups.lengths, groups.ends, row_tokens=1024, rows_per_step=2)
    names = ("help", "style") if kind == "scores" else ()
    report = measure.report({"data": groups}, plans={"data": measure.filling(groups, plan)}, names=names)
    text = DataAudit(report, "<script>alert(1)</script>", ["a note"], ["a problem & more"]).page()
    page = Reader(text)
    assert (
        not page.loads
        and "http:" not in text
        and "https:" not in text
        and "@import" not in text
        and "url(//" not in text
    )
    assert "<script" not in text and "&lt;script&gt;" in text and "A problem &amp; more" in text
    assert len({plot["says"] for plot in page.plots}) == len(page.plots) >= 5
    assert all(plot["marks"] for plot in page.plots) and all(len(plot["texts"]) >= 5 for plot in page.plots)
    assert "font-family: '" not in text  # the page's typeface is that of the plots
    texts = [text for plot in page.plots for text in plot["texts"]]
    for expected in PLOTS[kind]:
        assert any(text.startswith(expected) for text in texts), expected
    references = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', text))
    assert references <= set(re.findall(r'id="([\w-]+)"', text))


def test_nothing_to_compare_is_said_not_drawn(build):
    rows = [{"prompt": f"q {i}", "response": "same", "score": 1} for i in range(5)]
    report = measure.report({"data": build(rows, Attributes(("score",)))}, names=("score",))
    page = Reader(DataAudit(report, "rows", [], []).page())
    assert page.plots and not any(" by " in plot["says"] and "mean" in plot["says"] for plot in page.plots)
    assert audit_report.sentences(report["sets"]["data"], "tokens")["Length against label"].startswith("nothing")


def test_the_terminal_has_all_but_the_plots(rankings):
    report = measure.report({"training": rankings, "validation": rankings.select(range(10))})
    problems = audit_report.problems(report)
    text = "\n".join(DataAudit(report, "rows", ["tokenizer: mine"], problems).text())
    assert text.startswith("tokenizer: mine\n") and "Look at\n" in text and "Training: 1 sets of" in text
    assert "Training: 62 groups, 60 prompts" in text and "rows.jsonl:60 and rows.jsonl:61" in text
    assert re.search(r"\n  training +62 +0 +62 +60\n  validation +10 +10\n", text)

"""The report: it reaches for no outside address, every plot has data, and what is not there is left out."""

import html.parser
import io
import json
import re

import numpy as np
import pytest
from made_up_evaluations import KINDS, SCRIPT, estimate, evaluation, lines, preferences, timings

from rmjax.batches import measure
from rmjax.config import defaults
from rmjax.evaluate import gate
from rmjax.report import audit as audit_report
from rmjax.report import drawing, naming, panels
from rmjax.report import evaluation as evaluation_report
from rmjax.report import run as run_report
from rmjax.report.section import capital
from rmjax.runtime import files as durable

NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
OBJECTIVE = {"preferences": "bradley_terry", "attributes": "pointwise", "steps": "prm", "tokens": "sft"}
METRIC = {"attributes": "mse", "tokens": "verdict_accuracy"}


class Page(html.parser.HTMLParser):
    """What a page would load, its headings and text, and of each plot the marks that carry data and the texts."""

    def __init__(self, text):
        super().__init__()
        self.text, self.loads, self.headings, self.words, self.plots, self.within = text, [], [], [], [], []
        self.tags = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        wanted = ("src", "href", "xlink:href", "data", "srcset", "action", "poster")
        self.loads += [v for k, v in values.items() if k in wanted and not v.startswith("#")]
        if tag == "svg":
            self.plots.append({"says": values["aria-label"], "texts": [], "marks": [], "numbers": []})
        if tag in ("path", "use", "rect") and self.plots:
            place = values.get("d", "") + " ".join(values.get(k, "") for k in ("x", "y", "width", "height"))
            self.plots[-1]["numbers"] += re.findall(r"nan|inf", place)
            if tag == "path" and re.search("|".join(drawing.DATA), values.get("style", "")):
                self.plots[-1]["marks"].append([float(x) for x in re.findall(NUMBER, place)])
        if tag in ("h1", "h2", "h3", "text", "style"):
            self.within.append(tag)

    def handle_endtag(self, tag):
        if self.within and self.within[-1] == tag:
            self.within.pop()

    def handle_data(self, text):
        where = self.within[-1] if self.within else ""
        if where in ("h2", "h3"):
            self.headings.append(text)
        elif where == "text":
            self.plots[-1]["texts"].append(text)
        elif where != "style":
            self.words.append(text)


def audit():
    counts = measure.histogram(np.arange(300) % 90, few=0)
    one = {
        **{"groups": 5790, "prompts": 3865, "plan": None, "contradicting": {"sets": 2, "examples": [["a:1", "b:2"]]}},
        "trees": {"median": 55.0, "p90": 89.0, "p99": 102.0, "most": 115.0, **counts},
        "conversations": {"median": 39.0, "p90": 74.0, "p99": 87.0, "most": 95.0, **counts},
        "sharing": {"tokens": 353296, "unshared": 521821, "saved": 0.323},
        "labels": {"kind": "preferences", "comparisons": {"preferred": 5790, "tie": 0}},
        "length": {"comparisons": 5790, "auc": 0.497, "unit": "tokens"},
    }
    reason = {"meaning": "neither is preferred", "rows": 120, "kept": 0, "files": {"x": 120}, "example": "x:1"}
    reading = {"rows": 6000, "unusable": 90, "sources": {"pairs": 5790}, "reasons": {"tie": reason}}
    return {
        **{"version": 1, "unit": "tokens", "reading": {"training": reading}},
        **{"sets": {"training": one, "validation": one}, "shared": {}},
    }


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Writes a report; gives the page and its folder."""

    def call(title="", **parts):
        directory = tmp_path_factory.mktemp("report")
        path = run_report.write_report(directory, parts, title)
        assert path == directory / "report.html" and sorted(p.name for p in directory.iterdir()) == [
            "report",
            path.name,
        ]
        return Page(path.read_text()), directory / "report"

    return call


@pytest.fixture(scope="module")
def full(write):
    """Of every kind of measurement, with all there is."""
    made = {}
    for kind, objective in OBJECTIVE.items():
        of, told = evaluation(kind), lines(metric=METRIC.get(kind, "accuracy"), rewards=kind == "preferences")
        config = defaults(objective)
        made[kind] = write(
            metrics=told,
            timings=timings(),
            audit=audit(),
            evaluation=of,
            quality=gate.judge(config.gate, of, told),
            config=config.to_dict(),
            environment={"date": "2026-11-27", "versions": {"jax": "0.10.2"}, "devices": ["cpu"]},
            title=f"{kind} & {SCRIPT}",
        )
    return made


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_reaches_for_no_outside_address(full, kind):
    page, _ = full[kind]
    assert not page.loads and not {"script", "link", "iframe", "img", "object", "embed"} & page.tags
    assert not re.search(r"https?:|@import|url\(\s*[^#\s]|//fonts|javascript:", page.text)
    references = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', page.text))
    ids = re.findall(r'id="([\w-]+)"', page.text)
    assert references <= set(ids) and len(ids) == len(set(ids))


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_plot_has_data_on_the_page_and_as_png(full, kind):
    import matplotlib.image

    page, folder = full[kind]
    assert len(page.plots) >= 6 and len({plot["says"] for plot in page.plots}) == len(page.plots)
    for plot in page.plots:
        assert plot["marks"] and not plot["numbers"], plot["says"]
        assert any(len(mark) >= 4 and np.isfinite(mark).all() for mark in plot["marks"]), plot["says"]
        assert len(plot["texts"]) >= 4
    files = sorted(folder.iterdir())
    assert len(files) == len(page.plots)
    for file in files:
        image = matplotlib.image.imread(io.BytesIO(file.read_bytes()), format="png")
        assert re.fullmatch(r"\w+\.png", file.name) and image.shape[1] == drawing.DOTS * drawing.WIDE
        colored = np.ptp(image[..., :3], axis=2) > 0.2  # text, axes and grids are nearly grey
        assert colored.sum() > 300, file.name


def test_sections_stand_in_the_order_of_reading(full):
    page, _ = full["preferences"]
    sections = ["Key numbers", "Learning curves", "Rewards", "Calibration and best of n", "Slices"]
    sections += ["Most confidently wrong", "Benchmark reward_bench", "Data", "Speed", "Config", "Environment"]
    assert [heading for heading in page.headings if heading in sections] == sections
    assert page.text.index("Good enough: passes all 5 checks") < page.text.index("<h2")
    says = " ".join(plot["says"] for plot in page.plots)
    for what in (
        "Quantiles",
        "histograms of the rewards",
        "probability against",
        "gold margin",
        "best of n",
        "Pairs a",
    ):
        assert what in says, what


@pytest.mark.parametrize("kind", list(KINDS))
def test_key_numbers_have_their_intervals(full, kind):
    page, _ = full[kind]
    for name, value in KINDS[kind]()["metrics"].items():
        shown = naming.metric(name, kind)
        where = page.text[page.text.index(f'<td class="">\n{shown.title}\n') :][:400]
        assert naming.number(value["value"], shown.percent) in where and naming.interval(value, shown.percent) in where


def test_the_audit_says_what_the_audit_page_says(full):
    words = " ".join(full["preferences"][0].words)
    measured = audit()["sets"]["training"]
    for said in (*audit_report.sentences(measured, "tokens").values(), *audit_report.problems(audit())):
        assert capital(said) in words
    assert "neither is preferred" in words and "5,790" in words


def test_text_of_others_is_escaped(full):
    page, _ = full["preferences"]
    assert "<script" not in page.text and page.text.count("&lt;script&gt;") > 7
    assert "$1" in " ".join(text for plot in page.plots for text in plot["texts"])


def test_wrong_pairs_are_readable_and_their_differences_marked(full):
    page, _ = full["preferences"]
    assert page.text.count("<mark>river</mark>") == page.text.count("<mark>garden</mark>") == 7
    assert "2 more" in page.text and "4.6 less reward" in page.text


@pytest.mark.parametrize(
    "parts, headings",
    [
        ({}, []),
        ({"metrics": lines()}, ["Learning curves", "Rewards"]),
        ({"metrics": lines(rewards=False)[:1]}, ["Learning curves"]),
        ({"timings": timings()}, ["Speed"]),
        ({"evaluation": {"sets": {}, "benchmarks": {}}}, []),
        ({"metrics": [{"step": 1, "train/loss": None}], "timings": [{"step": 1, "timing/step_seconds": None}]}, []),
        ({"config": {"seed": 0}, "environment": {}}, ["Config"]),
        ({"evaluation": {"sets": {"mine": {"kind": "preferences", "groups": 1, "prompts": 1, "metrics": {}}}}},
         ["Key numbers"]),
    ],
)  # fmt: skip
def test_what_is_not_there_is_left_out(write, parts, headings):
    page, folder = write(**parts)
    assert page.headings == headings and len(page.plots) == len(list(folder.iterdir()))
    assert all(plot["marks"] for plot in page.plots)


def test_empty_and_unknown_measurements_draw_nothing():
    bare = preferences()
    unknown = {"value": None, "low": None, "high": None}
    bare["reliability"] = {"edges": [0.5, 1.0], "counts": [0], "predicted": [None], "observed": [None]}
    bare |= {
        "margins": {"values": [], "counts": []},
        "chosen": None,
        "slices": {"source": [{"name": "a", "pairs": 0, **unknown}]},
    }
    bare["best_of_n"] = None
    of = evaluation_report
    makers = (of.reliability_plots, of.reward_plots, of.slice_plots, of.best_of_n_plots)
    assert [make("validation", bare) for make in makers] == [[], [], [], []]
    empty = {"groups": 0, "metrics": {"overall": unknown}, "subsets": {"a": {"count": 0, **unknown}}}
    assert of.benchmark_plots("b", empty) == []


def test_a_judge_and_odd_shapes_are_drawn(write):
    """Few values instead of bins, one bin, intervals that are not known, several sets, and names that are the same."""
    judge = preferences()
    for key in ("chosen", "rejected", "best_of_n"):
        del judge[key]
    judge["metrics"] |= {"consistency": estimate(0.9), "conflict_rate": estimate(0.02)}
    judge["margins"] = {"values": [-1.0, 0.0, 1.0], "counts": [3, 1, 9]}
    judge["slices"] = {"source": [{"name": "only", "pairs": 3, **estimate(0.5, None)}]}
    judge["worst"] = [
        {"id": "a:1", "source": "s", "preferred": 1, "rejected": 0, "probability": 0.1, "difference": None}
    ]
    other = {
        **preferences(),
        "chosen": {"values": [1.0, 2.0], "counts": [2, 5]},
        "rejected": {"values": [1.0], "counts": [7]},
    }
    page, folder = write(evaluation={"sets": {"a b": judge, "a-b": other}})
    assert {"margins_a_b.png", "margins_a_b_2.png"} <= {file.name for file in folder.iterdir()}
    assert all(plot["marks"] for plot in page.plots) and "1 over 0" in page.text
    assert "a b: Margins" in [text for plot in page.plots for text in plot["texts"]]
    assert "Order consistency" in page.text and "Conflicts" in page.text


def test_a_failing_gate_is_said_with_what_to_do(write):
    of = evaluation()
    judged = gate.judge({"accuracy": 0.95, "gap": 0.1, "ece": 0.1}, of, [])
    page, _ = write(quality=judged)
    words = " ".join(page.words)
    assert "Not good enough: fails 1 of 3 checks of the quality gate" in words and "What to do: " in words
    nothing, *_ = evaluation_report.verdict(gate.judge({"accuracy": 0.7}, {}, []))
    assert "checked nothing" in nothing
    one, *_ = evaluation_report.verdict(gate.judge({"accuracy": 0.7}, of, []))
    assert one == "Good enough: passes the one check of the quality gate"


def test_a_new_report_replaces_the_old_one(tmp_path):
    run_report.write_report(tmp_path, {"metrics": lines()})
    before = {file.name for file in (tmp_path / "report").iterdir()}
    run_report.write_report(tmp_path, {"timings": timings()})
    after = {file.name for file in (tmp_path / "report").iterdir()}
    assert before and after and not before & after
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report", "report.html"]


def state(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_files_of_others_stay_where_a_report_is_written(tmp_path, caplog):
    """Notes, a plot that somebody has drawn into, plots that another program has made, a page of another one."""
    folder = tmp_path / "report"
    folder.mkdir()
    mine = {"notes.md": b"notes", "mine.png": b"mine", "loss.png": b"of another program", "partial.report": b"mine"}
    for name, data in mine.items():
        (folder / name).write_bytes(data)
    (tmp_path / "report.html").write_text("<html>mine</html>")
    (tmp_path / "partial.report").mkdir()
    (tmp_path / "partial.report" / "thesis.txt").write_text("mine")
    run_report.write_report(tmp_path, {"metrics": lines()})
    made = {p.name for p in folder.iterdir()} - mine.keys()
    drawn = folder / sorted(made)[0]
    assert made and (tmp_path / "report.before-1.html").read_text() == "<html>mine</html>"
    drawn.write_bytes(b"an arrow, here")
    caplog.clear()
    run_report.write_report(tmp_path, {"metrics": lines()})
    assert drawn.read_bytes() == b"an arrow, here" and str(drawn) in caplog.text
    run_report.write_report(tmp_path, {"timings": timings()})
    assert {p.name for p in folder.iterdir()} & made == {drawn.name} and drawn.read_bytes() == b"an arrow, here"
    assert {name: (folder / name).read_bytes() for name in mine} == mine
    assert (tmp_path / "partial.report" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "report.before-2.html").exists()


def test_a_report_is_not_written_through_links(tmp_path):
    precious = {name: tmp_path / name for name in ("page", "folder", "folder/plot.png")}
    precious["folder"].mkdir()
    for name in ("page", "folder/plot.png"):
        precious[name].write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.html").symlink_to(precious["page"])
    (run / "report").symlink_to(precious["folder"])
    assert "<svg" in run_report.write_report(run, {"metrics": lines()}).read_text()
    assert (run / "report").is_symlink() and [p.name for p in precious["folder"].iterdir()] == ["plot.png"]
    (run / "report").unlink()
    run_report.write_report(run, {"metrics": lines()})
    plot = sorted((run / "report").iterdir())[0]
    plot.unlink()
    plot.symlink_to(precious["page"])
    run_report.write_report(run, {"metrics": lines()})
    assert plot.is_symlink() and all(precious[name].read_text() == "precious" for name in ("page", "folder/plot.png"))


def test_a_report_that_is_killed_anywhere_is_made_whole_by_the_next(tmp_path, monkeypatch):
    run_report.write_report(tmp_path / "whole", {"timings": timings()}, title="x")
    whole, real = state(tmp_path / "whole"), durable.write_whole
    for last in range(1, 40):
        directory = tmp_path / str(last)
        run_report.write_report(directory, {"metrics": lines()}, title="x")
        (directory / "report" / "notes.md").write_text("notes")
        left = [last]

        def killed(path, data, left=left):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return real(path, data)

        monkeypatch.setattr(durable, "write_whole", killed)
        try:
            run_report.write_report(directory, {"timings": timings()}, title="x")
            break
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.setattr(durable, "write_whole", real)
        run_report.write_report(directory, {"timings": timings()}, title="x")
        assert state(directory) == {**whole, "report/notes.md": b"notes"}
    assert last > 3


def test_the_same_data_gives_the_same_page(tmp_path):
    pages = [run_report.write_report(tmp_path / name, {"timings": timings()}, title="x").read_text() for name in "ab"]
    assert pages[0] == pages[1]


def test_of_run_reads_what_is_there(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n{"step": 2, "tra')
    (tmp_path / "quality.json").write_text(json.dumps({"passed": True, "checks": []}))
    found = run_report.read_parts(tmp_path)
    assert found == {"metrics": [{"step": 1, "train/loss": 0.5}], "quality": {"passed": True, "checks": []}}
    (tmp_path / "audit.json").write_text("{")
    with pytest.raises(ValueError, match=r"audit\.json is not JSON .*; delete it"):
        run_report.read_parts(tmp_path)


def test_long_texts_are_cut_and_texts_unlike_each_other_not_marked():
    entry = {"id": "a", "source": "", "probability": 0.1, "preferred_text": "x" * 9000, "rejected_text": "other words"}
    shown = evaluation_report.wrong_pair(entry)
    assert shown.preferred == [(True, "x" * 4000 + " … (5,000 more characters)")]
    assert evaluation_report.wrong_pair({**entry, "rejected_text": None}) is None
    first, second = evaluation_report.differing("a b, c d e", "a b. c d e")
    assert [text for same, text in first if not same] == [","] and [text for same, text in second if not same] == ["."]
    assert "".join(text for _, text in first) == "a b, c d e"


def test_a_long_line_keeps_its_ends_its_peaks_and_no_more_points_than_can_be_seen():
    y = np.sin(np.arange(50_000) / 900)
    y[[12_345, 40_001]] = 9.0, -9.0
    line = panels.Line("", "red", list(range(50_000)), y.tolist(), bands=[((y - 1).tolist(), (y + 1).tolist(), 0.2)])
    short = panels.thinned(line)
    assert len(short.x) <= 2 * panels.PARTS + 2 and short.x == sorted(short.x)
    assert {0, 12_345, 40_001, 49_999} <= set(short.x) and short.y == y[short.x].tolist()
    assert all(np.array_equal(side, y[short.x] + shift) for side, shift in zip(short.bands[0], (-1, 1)))
    few = panels.Line("", None, list(range(2_000)), [0.0] * 2_000)
    assert panels.thinned(few) is few


def test_long_names_keep_both_ends():
    assert panels.cut("a" * 20 + "b" * 20, 10) == "aaaaa…bbbb"


# Simulations of missing red, green and blue cones, of linear RGB: Machado et al. 2009, severity 1.
BLIND = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(color):
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear sRGB, white point D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.clip(to_xyz @ rgb, 0.009, None) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("pair", [(drawing.TRAIN, drawing.VALIDATION), (drawing.CHOSEN, drawing.REJECTED)])
@pytest.mark.parametrize("kind", list(BLIND))
def test_pairs_of_colours_are_told_apart_without_red_green_or_blue(pair, kind):
    seen = [lab(np.clip(np.array(BLIND[kind]) @ linear(color), 0, 1)) for color in pair]
    assert np.linalg.norm(seen[0] - seen[1]) > 40  # 2.3 is just noticeable


@pytest.mark.parametrize(
    "color", [drawing.TRAIN, drawing.VALIDATION, drawing.CHOSEN, drawing.REJECTED, drawing.SOFT, drawing.INK]
)
def test_text_in_colour_has_contrast_on_white(color):
    luminance = np.dot([0.2126, 0.7152, 0.0722], linear(color))  # WCAG 2.2
    assert 1.05 / (luminance + 0.05) >= 4.5

"""What a judge wrote while it was trained by reinforcement: curves of its samples, and the samples themselves."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rmjax.report import panels
from rmjax.report.drawing import TRAIN
from rmjax.report.naming import metric, number
from rmjax.report.panels import Line
from rmjax.report.section import Folded, Plot, Section, Table
from rmjax.runtime import files

Values = Mapping[str, Any]
CURVES = (
    *("reward_mean", "dead", "unreadable", "cut_off", "answer_tokens", "entropy"),
    *("mismatch", "first_position", "tie_rate", "shared"),
)
SHOWN = 5  # samples of each kind
LONGEST = 600  # characters of a text
Sample = tuple[Values, Values]  # a line of rollouts/STEP.jsonl, and one of its responses


def read(directory: Path) -> list[Values]:
    """The lines of the last step in a run's `rollouts`; [] where there are none."""
    steps = [path for path in directory.glob("*.jsonl") if path.stem.isdecimal()]
    return list(files.read_json_lines(max(steps, key=lambda path: int(path.stem)))) if steps else []


def section(metrics: Sequence[Values], rollouts: Sequence[Values]) -> Section:
    """Curves from the lines of metrics.jsonl, and the best, worst and unreadable samples of the last step."""
    samples = [(line, response) for line in rollouts for response in line["responses"]]
    rated = sorted((x for x in samples if x[1]["reward"] is not None), key=lambda x: x[1]["reward"])
    readable = [x for x in rated if x[1]["readable"]]
    kinds = {
        "Best": readable[::-1][:SHOWN],
        "Worst": readable[:SHOWN],
        "Unreadable": [x for x in samples if not x[1]["readable"]][:SHOWN],
    }
    title = f"Samples of step {rollouts[0]['step']:,}" if rollouts else "Samples"
    tables = [Folded(f"{name}: {len(chosen)}", [_table(chosen)]) for name, chosen in kinds.items() if chosen]
    return Section(title, list(_plots(metrics)), *tables)


def _table(samples: Sequence[Sample]) -> Table:
    rows = [
        [
            str(line["id"]),
            str(line["label"]),
            str(said["verdict"]),
            "–" if said["reward"] is None else number(said["reward"]),
            f"{len(said['tokens'])} ({said['finish']})",
            _short(line["question"]),
            _short(said["text"]),
        ]
        for line, said in samples
    ]
    return Table(rows, ["row", "label", "verdict", "reward", "tokens", "question", "answer"], (3,))


def _short(text: str) -> str:
    """At most LONGEST characters, without the middle of what is longer: a verdict stands at the end."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"


def _plots(metrics: Sequence[Values]) -> Iterator[Plot]:
    if not any("train/dead" in line for line in metrics):  # only of runs that draw samples
        return
    for name in CURVES:
        points = [(x["step"], x[f"train/{name}"]) for x in metrics if x.get(f"train/{name}") is not None]
        if points:
            shown = metric(name)
            steps, values = map(list, zip(*points))
            line = Line("", TRAIN, steps, values, False)
            panel = panels.curves([line], share=shown.percent)
            yield Plot(f"samples_{name}", shown.title, panel, f"{shown.title} of the samples over the steps")

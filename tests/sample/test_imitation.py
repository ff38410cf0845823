"""Judges by filtered imitation, as in docs/sampling.md: draw judgements, keep the right ones, train on them."""

import json
import runpy
from pathlib import Path

import pytest

from rmjax.data import __main__ as data
from rmjax.sample import __main__ as sample
from rmjax.train import training

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.scratch.hidden_size": 32,
    "model.scratch.intermediate_size": 48,
    "plan.row_tokens": 256,
    "optim.learning_rate": 1e-2,
    "eval.every": "200 steps",
    "log.to": "",
    "log.report": False,
}


@pytest.mark.slow
def test_a_judge_learns_from_what_it_wrote_rightly(tmp_path, capsys):
    """Imitating what it wrote rightly, a judge that guesses is right more often about the same questions."""

    def train(name, **values):
        config = runpy.run_path(str(ROOT / "configs/sft_tiny.py"))["get_config"]()
        keys = {key.replace("__", "."): value for key, value in values.items()}
        config.update_from_flattened_dict({**SMALL, "data.cache_dir": str(tmp_path / "cache"), **keys})
        training.run(config, tmp_path / name)
        return str(tmp_path / name)

    def judge(model, *flags):
        """The rows of judgements, how many are right, and the file of these."""
        drawn, right = tmp_path / "drawn.jsonl", tmp_path / "right.jsonl"
        source = "synthetic://ratings?n=60&seed=2"
        sample.main([f"--model={model}", f"--input={source}", f"--output={drawn}", "--max_tokens=16", *flags])
        capsys.readouterr()
        data.main(["keep_right", str(drawn), f"--output={right}"])
        rows = [json.loads(line) for line in drawn.read_text().splitlines()]
        assert len(rows) == 60 and all(len(row["verdicts"]) == 4 for row in rows)
        kept = [
            {"messages": [*row["messages"], {"role": "assistant", "content": text}]}
            for row in rows
            for text, verdict, finish in zip(row["responses"], row["verdicts"], row["finish"])
            if verdict == row["label"] and finish == "stop"
        ]
        assert kept == [json.loads(line) for line in right.read_text().splitlines()]
        assert f"kept {len(kept):,} (" in capsys.readouterr().out
        return rows, len(kept), str(right)

    sets = {"data__train": "synthetic://ratings?n=400&seed=0", "data__validation": "synthetic://ratings?n=60&seed=1"}
    first = train("first", duration="100 steps", **sets)
    rows, before, right = judge(first, "--judge", "--responses=4")
    assert before, "the first judge writes no verdict that is right"
    (question,) = rows[0]["messages"]
    template = tmp_path / "question.jinja"
    template.write_text(runpy.run_path(str(ROOT / "configs/sft_tiny.py"))["TEMPLATE"])
    second = train(
        "second",
        duration="60 steps",
        objective__target="messages",
        objective__turns="last",
        objective__template="",
        model__init_from=f"{first}/export",
        data__train=right,
        data__validation=right,
    )
    again, after, _ = judge(f"{second}/export", "--judge=score", f"--template={template}", "--responses=4")
    assert again[0]["messages"] == [question] and again[0]["label"] == rows[0]["label"]
    assert after > before, (before, after)

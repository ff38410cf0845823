"""Several sources in one run, each with its own kind of label: pairs, ties, votes, rankings, strengths."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from rmjax import config as config_lib
from rmjax import objectives
from rmjax.batches import prepare, select, token_cache
from rmjax.batches.chat import Chat
from rmjax.batches.tasks import Preferences
from rmjax.train import training

ROOT = Path(__file__).parents[2]
N = 40  # rows of each source


def sources():
    """Rows by source; every prompt and response has the number of its row."""
    ask = lambda i: [{"role": "user", "content": f"question {i}"}]
    says = lambda i, k: {"role": "assistant", "content": f"answer {i} {'word ' * k}"}
    text = lambda i, k: says(i, k)["content"]
    for i in range(N):
        yield "pairs", {"prompt": f"question {i}", "chosen": text(i, 0), "rejected": text(i, 1)}
        yield "strengths", {"prompt": ask(i), "chosen": [says(i, 2)], "rejected": [says(i, 3)], "margin": i % 3}
        verdict = {"preferred": ("A", "B", "tie")[i % 3], "preference_strength": i % 4}
        yield "judged", {"input": ask(i), "output": [says(i, 4), says(i, 5)], "metadata": verdict}
        votes = {"annotator1": 1, "annotator2": 1, "annotator3": (0, 1, 2)[i % 3]}
        asked = {"instruction": f"question {i}", "input": "", "response1": text(i, 6), "response2": text(i, 7)}
        yield "voted", {**asked, **votes}
        ranks = [2, 1, 2, None] if i % 2 else [4, 3, 2, 1]
        yield "ranked", {"prompt": f"question {i}", "responses": [text(i, k) for k in range(8, 12)], "ranks": ranks}


@pytest.fixture
def spec(tmp_path):
    rows = list(sources())
    names = list(dict.fromkeys(name for name, _ in rows))
    for name in names:
        lines = (json.dumps(row) + "\n" for source, row in rows if source == name)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return ",".join(f"{tmp_path}/{name}.jsonl" for name in names)


def test_every_source_keeps_its_labels(spec, tokenizer, tmp_path):
    groups = token_cache.build(spec, Chat(tokenizer), Preferences("keep"), workers=0, cache_dir=tmp_path / "cache")
    assert groups.audit.sources == dict.fromkeys(("pairs", "strengths", "judged", "voted", "ranked"), N)
    assert not groups.audit.reasons and sorted(set(groups.responses)) == [2, 4]
    at = lambda name, i: groups.group(groups.sources.index(name) * N + i)
    labels = lambda name, i: [at(name, i).labels[field].tolist() for field in ("wins", "ties", "margin")]
    none = [[0, 0], [0, 0]]
    first, second, tie = [[0, 1], [0, 0]], [[0, 0], [1, 0]], [[0, 1], [1, 0]]
    assert labels("pairs", 7)[:2] == [first, none]
    np.testing.assert_array_equal(labels("pairs", 7)[2], [[0, np.nan], [0, 0]])
    assert labels("strengths", 5) == [first, none, [[0, 2], [0, 0]]]
    assert labels("judged", 6) == [first, none, [[0, 2], [0, 0]]]
    assert labels("judged", 7) == [second, none, [[0, 0], [3, 0]]]
    assert labels("judged", 8)[:2] == [none, tie]
    np.testing.assert_allclose(labels("voted", 3)[:2], [[[0, 2 / 3], [0, 0]], [[0, 1 / 3], [1 / 3, 0]]], rtol=1e-6)
    np.testing.assert_allclose(labels("voted", 5)[:2], [[[0, 2 / 3], [1 / 3, 0]], none], rtol=1e-6)
    assert labels("ranked", 2)[:2] == [np.tri(4, k=-1).tolist(), np.zeros((4, 4)).tolist()]
    wins, ties, _ = (np.array(x) for x in labels("ranked", 3))
    assert np.argwhere(wins).tolist() == [[1, 0], [1, 2]] and np.argwhere(ties).tolist() == [[0, 2], [2, 0]]
    sure = select.filtered(groups, "source == 'voted' and agreement > 0.7")
    assert len(sure) == sum(i % 3 == 1 for i in range(N)) and set(sure.agreements) == {1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rankings", "ties", "augment"),
    [
        ("pairs", "davidson", ""),
        pytest.param("pairs", "skip", "all_pairs", marks=pytest.mark.release),
        pytest.param("plackett_luce", "efron", "", marks=pytest.mark.release),
    ],
)
def test_one_run_learns_from_all_of_them(spec, tmp_path, capsys, rankings, ties, augment):
    config = runpy.run_path(str(ROOT / "configs" / "bt_tiny.py"))["get_config"]()
    values = {
        **{"data.train": spec, "data.validation": "", "data.validation_fraction": 0.2, "data.workers": 0},
        **{"data.cache_dir": str(tmp_path / "cache"), "data.weights": "ranked=0.5,pairs=2", "data.augment": augment},
        **{"data.filter": "source != 'voted' or agreement > 0.6", "data.sample": "judged=10"},
        **{"plan.row_tokens": 256, "plan.groups_per_step": 24, "duration": "6 steps", "eval.every": "3 steps"},
        **{"objective.rankings": rankings, "objective.ties": ties, "model.scratch.hidden_size": 32},
    }
    config.update_from_flattened_dict(values)
    training.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line[key] for line in lines for key in ("train/loss", "validation/loss") if key in line]
    assert len(losses) >= 4 and np.isfinite(losses).all()
    shown = capsys.readouterr().out
    (mixture,) = [line for line in shown.splitlines() if line.startswith("an epoch shows: ")]
    assert all(f"{name} " in mixture for name in ("pairs", "strengths", "judged", "voted", "ranked"))
    assert "sample " in shown and ("all_pairs made" in shown) == bool(augment)
    most = "2 responses in a group" if augment else "4 responses in a group"
    assert most in shown


def test_the_plan_of_a_mixture_shows_what_was_asked_for(spec, tmp_path, tokenizer):
    config = config_lib.defaults()
    config.objective.ties = "half"
    config.data.train, config.data.cache_dir, config.data.workers = spec, str(tmp_path / "cache"), 0
    config.data.weights, config.plan.row_tokens, config.duration = "ranked=0.5,pairs=2", 512, "2 epochs"
    groups, _ = prepare.read_groups(config, Chat(tokenizer), objectives.make(config.objective).task)
    plan = prepare.plan_training(config, groups)
    shown = np.bincount(groups.source[plan.groups], minlength=5) / 2
    have = dict(zip(groups.sources, np.bincount(groups.source)))
    expected = [have[name] * {"ranked": 0.5, "pairs": 2}.get(name, 1) for name in groups.sources]
    np.testing.assert_allclose(shown, expected, atol=0.5)

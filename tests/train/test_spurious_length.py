"""A spurious cue: the longer response wins nine of ten training pairs. Measured is where lengths tell nothing.

    python -m rmjax.main --config=configs/bt_tiny.py --workdir=DIR --config.duration="7 epochs" \
        --config.data.train="synthetic://long_winded?n=6000&seed=0" --config.objective.length_balance=1
"""

import pytest
import small_runs

COMMAND = {
    "duration": "7 epochs",
    "data.train": "synthetic://long_winded?n=6000&seed=0",
    "eval.train_groups": 0,
    "log.to": "",
    "log.report": False,
}


@pytest.mark.release  # two runs of a minute and a half; figures in docs/objectives.md
def test_balanced_training_is_right_more_often_where_lengths_tell_nothing(tmp_path):
    best = {}
    for balance in (0.0, 1.0):
        run = tmp_path / f"run_{balance:g}"
        small_runs.Started(run, tmp_path / "cache", small=COMMAND, objective__length_balance=balance).finish()
        best[balance] = small_runs.column(run, "validation/accuracy").max()
    assert best[1.0] > best[0.0] + 0.02, best

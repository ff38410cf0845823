"""What earlier versions wrote is still read: a run of ten steps and its export, made before the package's files moved.

Made at commit 050d1d5 by `python -m rmjax.main --config=configs/bt_tiny.py` with `small_runs.SMALL`, KEYS and duration
of "10 steps"; the data are rows of that commit's `synthetic://pairs`.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import small_runs

from rmjax.inference import runs
from rmjax.inference.reward_model import load_checked

RUN = Path(__file__).parent / "fixtures" / "run_of_0_1"
KEYS = {
    **dict.fromkeys(("eval.every", "checkpoint.every"), "10 steps"),
    **{"checkpoint.keep_latest": 1, "checkpoint.keep_best": 1},
    **{"model.scratch.hidden_size": 16, "model.scratch.intermediate_size": 16},
    # The demo's of that commit.
    **{"model.scratch.num_attention_heads": 4, "model.scratch.num_key_value_heads": 2, "optim.learning_rate": 3e-3},
    **{f"data.{part}": f"tests/fixtures/pairs_{part}.jsonl" for part in ("train", "validation")},
}


def test_its_checkpoint_scores_as_its_export_does():
    """Loading the export checked replays the golden scores that it was written with."""
    ask = {"role": "user", "content": "Tell me about the river. Green still often late."}
    talks = [[ask, {"role": "assistant", "content": text}] for text in ("It is late.", "An old garden.")]
    opened = runs.open_checkpoint(runs.find(RUN))
    assert opened.step == 10
    exported = load_checked(RUN / "export").score(talks)
    assert np.ptp(exported) > 1e-4
    np.testing.assert_allclose(
        runs.reward_model(opened.model, opened.chat, opened.params).score(talks), exported, atol=1e-5
    )


@pytest.mark.slow
def test_it_goes_on(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    before = small_runs.metrics(run)
    text = small_runs.Started(run, tmp_path / "cache", **{**KEYS, "duration": "20 steps"}).finish()
    assert "continuing from step 10" in text, text
    assert small_runs.metrics(run)[: len(before)] == before and small_runs.metrics(run)[-1]["step"] == 20

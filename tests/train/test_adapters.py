"""Runs that train adapters beside a frozen base: what they keep, how they go on, and what they export."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_runs import ROOT, SMALL, Started, checkpoints, column, flat, same_run

from rmjax.export import verify
from rmjax.inference import runs
from rmjax.inference.ensembles import Ensemble
from rmjax.inference.reward_model import RewardModel
from rmjax.models import peft

pytestmark = pytest.mark.slow
CONVERSATIONS = [
    [{"role": "user", "content": "Tell me about the river."}, {"role": "assistant", "content": text}]
    for text in ("Every quiet river soft under small.", "Soft garden empty near plain.")
]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory, cache_dir):
    """The export of a small run."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    Started(workdir, cache_dir).finish()
    return workdir


def adapted(base, **more):
    return {"model__init_from": base / "export", "lora__rank": 4, "optim__learning_rate": 2e-2, **more}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, cache_dir):
    """An uninterrupted run of adapters on a base in 4 bits."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    text = Started(workdir, cache_dir, **adapted(base, lora__base="nf4")).finish()
    assert "in a base that is kept as nf4; the others are frozen" in text
    return workdir


def test_a_killed_run_of_adapters_ends_with_the_same_bytes(whole, base, cache_dir, tmp_path):
    values = adapted(base, lora__base="nf4")
    started = Started(tmp_path / "run", cache_dir, **values)
    assert started.send_when(signal.SIGKILL, lambda: checkpoints(tmp_path / "run"))
    assert started.end()[0] == -signal.SIGKILL
    assert "continuing from step" in Started(tmp_path / "run", cache_dir, **values).finish()
    same_run(whole, tmp_path / "run")


def test_a_checkpoint_holds_only_what_is_trained(whole, base):
    step = max(checkpoints(whole))
    tree = json.loads((whole / "checkpoints" / str(step) / "_METADATA").read_text())["tree_metadata"]
    params = [name for name in tree if name.startswith("('params'")]
    assert params and all("lora_" in name or "score" in name for name in params)
    assert len(params) == sum(".mu" in name or "'mu'" in name for name in tree)
    size = lambda at: sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(at) for f in files if d != at)
    assert size(whole / "checkpoints" / str(step) / "ocdbt.process_0") < 0.75 * size(
        base / "checkpoints" / str(max(checkpoints(base))) / "ocdbt.process_0"
    )
    opened = runs.open_checkpoint(runs.Place(whole, "last"))
    ours = runs.reward_model(opened.model, opened.chat, opened.params, "float32")
    exported = RewardModel.load(whole / "export", dtype="float32")
    if checkpoints(whole)[-1] == step and opened.step == step:
        assert np.isfinite(ours.score(CONVERSATIONS)).all() and np.isfinite(exported.score(CONVERSATIONS)).all()


def test_the_first_loss_is_that_of_the_base_and_another_base_is_refused(base, cache_dir, tmp_path):
    shutil.copytree(base / "export", tmp_path / "start")
    config = json.loads((tmp_path / "start" / "config.json").read_text())
    without_pad = {name: value for name, value in config.items() if name != "pad_token_id"}  # as most language models
    (tmp_path / "start" / "config.json").write_text(json.dumps(without_pad))
    (tmp_path / "start" / "reward_contract.json").unlink()
    values = adapted(base, model__init_from=tmp_path / "start", export__adapter=True, duration="6 steps")
    Started(tmp_path / "run", cache_dir, **values).finish()
    last = runs.open_checkpoint(runs.Place(base, "best")).step
    lines = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    exported = next(x for x in lines if x["step"] == last and "validation/loss" in x)
    assert column(tmp_path / "run", "validation/loss")[0] == pytest.approx(exported["validation/loss"], abs=1e-6)

    said = "\n".join(verify.verify(tmp_path / "run" / "export"))
    assert "peft" in said and "all agree" in said
    terms = peft.read_config(tmp_path / "run" / "export")
    assert terms["base_model_name_or_path"] == str(tmp_path / "start") and terms["modules_to_save"] == ["score"]
    alone = RewardModel.load(tmp_path / "run" / "export", dtype="float32").score(CONVERSATIONS)
    opened = runs.open_checkpoint(runs.Place(tmp_path / "run", "best"))
    trained = runs.reward_model(opened.model, opened.chat, opened.params, "float32").score(CONVERSATIONS)
    np.testing.assert_allclose(alone, trained, atol=1e-5)

    with pytest.raises(ValueError, match=r"changed since the checkpoint of step \d+"):
        change_weights(tmp_path / "start" / "model.safetensors")
        runs.open_checkpoint(runs.Place(tmp_path / "run", "best"))
    code, text = Started(tmp_path / "run", cache_dir, **{**values, "duration": "8 steps"}).end()
    assert code and "the weights of config.model.init_from changed since the checkpoint" in text


def change_weights(path):
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_head_alone_and_a_state_on_the_host(base, cache_dir, tmp_path):
    short = {
        "model__init_from": base / "export",
        "duration": "6 steps",
        "eval__every": "6 steps",
        "plan__micro_rows": 1,
    }
    frozen = {"optim__freezes": (("score/.*", False), (".*", True)), "optim__learning_rate": 2e-2}
    Started(tmp_path / "head", cache_dir, **short, **frozen).finish()
    held = json.loads((tmp_path / "head" / "checkpoints" / "6" / "_METADATA").read_text())["tree_metadata"]
    assert [name for name in held if name.startswith("('params'")] == ["('params', 'score', 'kernel')"]
    before, after = (load_file(at / "export" / "model.safetensors") for at in (base, tmp_path / "head"))
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {"score.weight"}
    for state_on in ("device", "host"):
        values = {**adapted(base), **short, "optim__state_on": state_on}
        Started(tmp_path / state_on, cache_dir, **values).finish()
    here, there = (column(tmp_path / name, "train/loss") for name in ("device", "host"))
    np.testing.assert_allclose(here, there, rtol=1e-6)


def test_an_adapter_is_trained_on_and_merged(base, cache_dir, tmp_path):
    short = {"duration": "4 steps", "eval__every": "4 steps"}
    Started(tmp_path / "first", cache_dir, **adapted(base, export__adapter=True, **short)).finish()
    adapter = tmp_path / "first" / "export"
    on = adapted(base, model__init_from=adapter, export__adapter=True, **short)
    text = Started(tmp_path / "on", cache_dir, **on).finish()
    assert "score head: kept" in text
    merged = {"model__init_from": adapter, "optim__learning_rate": 1e-3, **short}
    text += Started(tmp_path / "merged", cache_dir, **merged).finish()
    ended = column(tmp_path / "first", "validation/loss")[-1]
    for name in ("on", "merged"):
        assert column(tmp_path / name, "validation/loss")[0] == pytest.approx(ended, abs=1e-6)

    # Both are adapters of one base, which an ensemble of them holds once.
    both = [adapter, tmp_path / "on" / "export"]
    ensemble = Ensemble.load(both, combine="mean", dtype="float32")
    shared = [jax.tree.leaves(member.params["decoder"]["last"]["q"]["kernel"])[0] for member in ensemble.members]
    assert shared[0] is shared[1]
    apart = [RewardModel.load(path, dtype="float32").score(CONVERSATIONS) for path in both]
    assert np.abs(np.subtract(*apart)).max() > 1e-4
    np.testing.assert_allclose(ensemble.score(CONVERSATIONS), np.mean(apart, 0), atol=1e-5)


@pytest.mark.parametrize(
    "objective", ["sft", "prm", *(pytest.param(name, marks=pytest.mark.release) for name in ("pairwise", "pointwise"))]
)
def test_every_objective_takes_adapters(objective, base, cache_dir, tmp_path):
    """Its export as an adapter is replayed by PEFT."""
    small = {
        **{key: value for key, value in SMALL.items() if not key.startswith(("data.", "model."))},
        **{"duration": "4 steps", "eval.every": "4 steps", "plan.row_tokens": 512, "eval.train_groups": 0},
        **{"data.train": f"synthetic://{SOURCES[objective]}?n=80&seed=0", "data.validation": ""},
        **{"data.validation_fraction": 0.2},
    }
    values = adapted(base, export__adapter=True, optim__learning_rate=1e-2)
    config = f"configs/{objective}_tiny.py"
    text = Started(tmp_path / "run", cache_dir, config=config, small=small, **values).finish()
    assert "trained: " in text
    if objective in ("sft", "prm", "pointwise"):
        assert "all agree" in "\n".join(verify.verify(tmp_path / "run" / "export"))


SOURCES = {"sft": "ratings", "prm": "steps", "pairwise": "verdicts", "pointwise": "scores"}


@pytest.mark.release  # several processes and adapters each have slow tests of their own
def test_two_processes_train_the_adapter_that_one_trains(base, cache_dir, tmp_path):
    short = {"export__adapter": True, "lora__base": "nf4", "duration": "4 steps", "eval__every": "4 steps"}
    values = adapted(base, optim__learning_rate=1e-3, **short)
    Started(tmp_path / "one", cache_dir, **values).finish()
    keys = {**SMALL, "data.cache_dir": cache_dir, **flat(values)}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    env = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [ROOT / "launch" / "local.sh", "2", "configs/bt_tiny.py", f"--workdir={tmp_path / 'two'}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "export" / peft.WEIGHTS) for name in ("one", "two"))
    assert one.keys() == two.keys() and any(x.any() for name, x in one.items() if "lora_B" in name)
    for name, x in one.items():
        np.testing.assert_allclose(two[name], x, atol=1e-4, err_msg=name)


@pytest.mark.release
def test_the_demo_of_adapters_reaches_the_score_that_it_states(tmp_path, cache_dir):
    Started(tmp_path / "run", cache_dir, config="configs/bt_lora_tiny.py", small={}).finish()
    accuracy = column(tmp_path / "run", "validation/accuracy")
    assert 0.6 < accuracy[0] < 0.85 and accuracy[-1] > 0.9

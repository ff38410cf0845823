"""The training run: sums, micro-batches, devices, resume, refusals, and the demo from start to export."""

import dataclasses
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import small_runs
from small_runs import ROOT, column, metrics, same_run

from rmjax import config as config_lib
from rmjax import objectives, sharding
from rmjax.batches import prepare
from rmjax.inference import parameters
from rmjax.models import config as model_config
from rmjax.models import heads
from rmjax.runtime.ownership import MARKER
from rmjax.train import evaluations, optim, resume, step, training

SMALL = small_runs.SMALL | {"eval.every": "4 steps", "checkpoint.every": ""}


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Of tokens, shared by all runs of the session."""
    return tmp_path_factory.mktemp("cache")


def small(cache_dir, **values):
    return small_runs.small(cache_dir, **{**SMALL, **values})


def command(workdir, cache_dir, **values):
    flat = {**SMALL, "data.cache_dir": str(cache_dir), **small_runs.flat(values)}
    flags = [f"--config.{key}={value}" for key, value in flat.items()]
    return [sys.executable, "-m", "rmjax.main", "--config=configs/bt_tiny.py", f"--workdir={workdir}", *flags]


def launch(workdir, cache_dir, devices=1, **values):
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    env["XLA_FLAGS"] = f"{quick.FLAGS} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        command(workdir, cache_dir, **values), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process, timeout=300):
    output = process.communicate(timeout=timeout)[0].decode()
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="session")
def finished(tmp_path_factory, cache_dir):
    """An uninterrupted small run and what it printed."""
    workdir = tmp_path_factory.mktemp("finished")
    output = finish(launch(workdir, cache_dir))
    return workdir, output


def test_prints_what_a_user_needs(finished):
    workdir, output = finished
    for part in ("decoder/embed/embedding", "Total:", "plan:", "validation", "pairs/s", "elapsed", "step "):
        assert part in output, part
    for name in ("export", "checkpoints", "metrics.jsonl"):
        assert str(workdir / name) in output and (workdir / name).exists()
    assert "python -m rmjax.score --model=" in output
    assert json.loads((workdir / "config.json").read_text())["duration"] == "2 epochs"


def test_metrics_hold_every_validation_pair_and_no_times(finished):
    workdir, _ = finished
    pairs = column(workdir, "validation/pairs")
    assert len(set(pairs)) == 1 and 50 <= pairs[0] <= 60
    last = [line for line in metrics(workdir) if "validation/loss" in line][-1]
    for name in ("accuracy", "tie_rate", "margin", "reward_mean", "reward_std", "reward_max", "reward_min"):
        assert np.isfinite(last[f"validation/{name}"]) and np.isfinite(last[f"train_slice/{name}"])
    rates = column(workdir, "train/learning_rate")
    assert rates[-1] < 0.2 * rates.max() and not any("second" in name for line in metrics(workdir) for name in line)


# Steps


def program_pieces(config, micro_rows):
    """State and batches of the small run in this process."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    values = {"vocab_size": 768, **config.model.scratch.to_dict()}
    model = parameters.abstract_model(config, objectives.make(config.objective), mesh, values)
    params = heads.init(model.config, 1, seed=0)
    config.model.remat = "none"
    loss = lambda p, b: step.loss_and_outcomes(p, b, model.graph, model.objective, config)
    return params, loss, model


def small_split(config, tmp_path, micro_rows):
    chat = prepare.open_chat(config, tmp_path)
    groups, _ = prepare.read_groups(config, chat, objectives.make(config.objective).task)
    plan = prepare.plan_training(config, groups)
    return prepare.Split(groups, plan, prepare.batch_shape(groups, plan, 1, micro_rows))


def test_micro_batches_do_not_change_the_gradient(cache_dir, tmp_path):  # NUMERICS 9
    config = small(cache_dir, plan__rows_per_step=4)
    params, loss, _ = program_pieces(config, 1)
    results = []
    for micro_rows in (4, 2, 1):
        split = small_split(config, tmp_path, micro_rows)
        source = prepare.loader.StepSource(split.groups, split.plan, split.shape, range(split.shape.rows))
        batch = source[split.plan.epoch_steps[0] - 1]  # the epoch's last step, which is partly padding
        assert split.shape.micro == 4 // micro_rows
        grads, sums = jax.jit(lambda p, b: step.accumulate(loss, p, b), compiler_options=quick.OPTIONS)(params, batch)
        weight = sums["loss"][1]
        results.append((jax.tree.map(lambda g, w=weight: np.asarray(g / w), grads), sums))
    for grads, sums in results[1:]:
        assert float(sums["loss"][1]) == float(results[0][1]["loss"][1])
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(results[0][0]), strict=True):
            assert np.abs(a - b).max() <= 1e-6


def test_evaluation_does_not_depend_on_the_batch_shape(cache_dir, tmp_path):  # NUMERICS 18
    config = small(cache_dir)
    params, loss, model = program_pieces(config, 1)
    chat = prepare.open_chat(config, tmp_path)
    _, validation = prepare.read_groups(config, chat, objectives.make(config.objective).task)
    program = step.Program(None, jax.jit(lambda p, b: loss(p, jax.tree.map(lambda x: x[0], b))), None, None)
    values = []
    for micro_rows, row_tokens in ((1, 256), (3, 256), (2, 512)):
        config.plan.row_tokens = row_tokens
        split = prepare.plan_evaluations(config, {"v": validation}, 1, micro_rows)["v"]
        evaluation = evaluations.Pass(split, model.objective.task, model.mesh)
        values.append(evaluation.metrics(program, params, lambda: False))
    for other in values[1:]:
        assert other["pairs"] == values[0]["pairs"] == len(validation)
        for name, value in other.items():
            assert value == pytest.approx(values[0][name], abs=2e-6), name


def test_donated_state_is_gone_and_nothing_else_is(cache_dir, tmp_path):  # NUMERICS 25
    config = small(cache_dir)
    params, _, model = program_pieces(config, 1)
    split = small_split(config, tmp_path, 4)
    with jax.set_mesh(model.mesh):
        program = step.build_program(config, model, split.plan)
        state = {"params": params, "opt": optim.make(config.optim).init(params)}
        state = jax.device_put(state, program.shardings)
        copy = jax.tree.map(np.array, state["params"])  # a view would keep the buffers
        rows = sharding.named(model.mesh, sharding.BATCH)
        batch = next(prepare.loader.batches(split.groups, split.plan, split.shape, rows))
        new, sums, halted = program.step(state, batch, jnp.int32(5), jnp.bool_(False))
        kept = [sharding.path_name(p) for p, x in jax.tree_util.tree_leaves_with_path(state) if not x.is_deleted()]
        assert kept == []
        assert float(sums["nonfinite_count"][0]) == 0 and not halted
        changed = [
            bool((np.asarray(a) != b).any()) for a, b in zip(jax.tree.leaves(new["params"]), jax.tree.leaves(copy))
        ]
        assert all(changed)


def test_head_is_replicated_and_specs_come_from_the_rules():  # NUMERICS 22 and 23
    model = model_config.from_hf(
        {
            "vocab_size": 64,
            "model_type": "qwen3",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    _, shapes = heads.abstract(model, 1)
    assert sharding.first_match(sharding.RULES, "score/kernel", "sharding") == jax.sharding.PartitionSpec()
    names = [sharding.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    assert all(sharding.first_match(sharding.RULES, name, "sharding") is not None for name in names)
    with pytest.raises(ValueError, match="no sharding rule matches parameter 'decoder/new/thing'"):
        sharding.first_match(sharding.RULES, "decoder/new/thing", "sharding")


def test_a_mesh_that_does_not_divide_the_devices():
    with pytest.raises(ValueError, match=r"data=3xfsdp=-1xtensor=1 does not divide the 1 devices"):
        sharding.make_mesh({"data": 3, "fsdp": -1, "tensor": 1}, jax.devices()[:1])
    with pytest.raises(ValueError, match="at most one may be -1"):
        sharding.make_mesh({"data": -1, "fsdp": -1, "tensor": 1}, jax.devices()[:1])


# Devices


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one_and_resume_each_other(tmp_path, cache_dir):
    common = {"log.every": "1 steps", "optim.learning_rate": 1e-4, "duration": "10 steps", "eval.every": "5 steps"}
    common = {k.replace(".", "__"): v for k, v in common.items()} | {"plan__rows_per_step": 4}
    runs = {
        "one": (1, {}),
        "fsdp": (8, {"mesh__fsdp": 8}),
        "mixed": (8, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}),
    }
    for name, (devices, mesh) in runs.items():
        finish(launch(tmp_path / name, cache_dir, devices, **common, **mesh))
    one = column(tmp_path / "one", "train/loss")
    assert len(one) == 10
    for name in ("fsdp", "mixed"):
        assert np.abs(column(tmp_path / name, "train/loss") - one).max() <= 1e-5, name
    # Stop at step 5 on one mesh, go on with another.
    for start, (devices, mesh) in (("one", runs["mixed"]), ("mixed", runs["one"])):
        workdir = tmp_path / f"resumed_{start}"
        shutil.copytree(tmp_path / start, workdir)
        shutil.rmtree(workdir / "checkpoints" / "10")
        output = finish(launch(workdir, cache_dir, devices, **common, **mesh))
        assert "continuing from step 5" in output
        assert np.abs(column(workdir, "train/loss") - one).max() <= 1e-5


# Resume


def test_resumed_in_the_middle_equals_uninterrupted(finished, tmp_path, cache_dir):
    """The last checkpoint is taken away: the run goes on from the one before, and cuts its metrics."""
    whole, _ = finished
    workdir = tmp_path / "cut"
    shutil.copytree(whole, workdir)
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())
    shutil.rmtree(workdir / "checkpoints" / str(steps[-1]))
    shutil.rmtree(workdir / "export")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')  # half a line
    output = finish(launch(workdir, cache_dir))
    assert f"continuing from step {steps[-2]}" in output
    same_run(whole, workdir)


def test_a_finished_run_started_again_changes_nothing(finished, tmp_path, cache_dir):
    whole, _ = finished
    workdir = tmp_path / "again"
    shutil.copytree(whole, workdir)
    finish(launch(workdir, cache_dir))
    same_run(whole, workdir)


# Refusals


def test_a_workdir_of_another_config_is_refused(finished, cache_dir):
    workdir, _ = finished
    with pytest.raises(ValueError, match=r"another config(.|\n)*config.seed: 0 before, 1 now"):
        training.run(small(cache_dir, seed=1), workdir)
    assert resume.check_workdir(small(cache_dir, log__to="tensorboard", mesh__fsdp=1), workdir) == []


def test_other_data_under_a_run_is_refused(finished, tmp_path, cache_dir):
    workdir = tmp_path / "moved"
    shutil.copytree(finished[0], workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["train"] = "synthetic://pairs?n=161&seed=0"
    marker = json.loads((workdir / "checkpoints" / MARKER).read_text())
    (workdir / "checkpoints" / MARKER).write_text(json.dumps({**marker, "config": json.dumps(config)}))
    with pytest.raises(ValueError, match="the training data changed since the checkpoint of step 20"):
        training.run(small(cache_dir, data__train="synthetic://pairs?n=161&seed=0"), workdir)


def test_not_finite_stops_with_step_rows_and_checkpoint(tmp_path, cache_dir):  # NUMERICS 10
    config = small(cache_dir, optim__learning_rate=1e30, optim__clip_norm=0.0)
    with pytest.raises(training.NonFiniteError, match=r"step (\d+): the loss or a gradient is NaN.*pairs") as error:
        training.run(config, tmp_path)
    step = int(str(error.value).split()[1].rstrip(":"))
    assert (tmp_path / "checkpoints" / str(step) / "manifest.json").exists()


def test_not_finite_steps_can_be_skipped_and_are_counted(tmp_path, cache_dir):
    config = small(cache_dir, optim__learning_rate=1e30, optim__clip_norm=0.0, on_nonfinite="skip", duration="6 steps")
    training.run(config, tmp_path)
    assert column(tmp_path, "train/skipped_steps")[-1] > 0
    verdict = json.loads((tmp_path / "quality.json").read_text())  # what cannot be measured is exported, and fails
    assert not verdict["passed"] and "not all finite" in verdict["checks"][0]["reason"]
    assert (tmp_path / "export" / "reward_contract.json").exists()


def test_dry_run_trains_nothing(tmp_path, cache_dir, capsys):
    training.run(small(cache_dir), tmp_path, dry_run=True)
    output = capsys.readouterr().out
    for part in ("plan:", "groups a step", "full", "sharing", "Total:", "per device", "MiB"):
        assert part in output, part
    assert not [name for name in ("checkpoints", "metrics.jsonl", "config.json") if (tmp_path / name).exists()]


def test_host_memory_of_a_run_survives_json():
    host = resume.Host({"a": "x"}, "y", {"loss": np.array([1 / 3, 7.0])}, 0.1, 2, 1, [[3, 5]])
    again = resume.Host.from_json(json.loads(json.dumps(host.to_json())))
    assert again.window["loss"].tolist() == host.window["loss"].tolist()
    assert dataclasses.replace(again, window={}) == dataclasses.replace(host, window={})


def test_early_stop_waits_for_patience():
    host = resume.Host({})
    for value, stopped in ((0.5, False), (0.6, False), (0.6, False), (0.55, True)):
        host.judge(value, "max", 2)
        assert host.stopped is stopped
    assert host.best == 0.6


@pytest.mark.slow
def test_the_demo_from_start_to_export(tmp_path):
    """The README's first line; CI has run it already, and names its workdir and what it printed."""
    workdir, printed = Path(os.environ.get("RMJAX_DEMO", tmp_path)), os.environ.get("RMJAX_DEMO_OUTPUT")
    if printed:
        output = Path(printed).read_text()
    else:
        command = [sys.executable, "-m", "rmjax.main", "--config=configs/bt_tiny.py", f"--workdir={workdir}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = finish(process, 900)
    assert "pairs/s" in output and " left" in output
    accuracy = column(workdir, "validation/accuracy")
    assert 0.4 < accuracy[0] < 0.6 and accuracy[-1] > 0.85
    assert (workdir / "export" / "model.safetensors").exists()


@pytest.mark.release
@pytest.mark.parametrize("seed", [1, 2])
def test_the_demo_with_other_seeds(seed, tmp_path, cache_dir):
    config = runpy.run_path(str(ROOT / "configs" / "bt_tiny.py"))["get_config"]()
    config.seed, config.data.cache_dir = seed, str(cache_dir)
    training.run(config, tmp_path)
    accuracy = column(tmp_path, "validation/accuracy")
    assert 0.4 < accuracy[0] < 0.6 and accuracy[-1] > 0.85


def test_a_metric_that_is_not_measured_is_named_before_training(tmp_path, cache_dir):
    with pytest.raises(ValueError, match=r"'validation/acuracy' is not measured; there is .*validation/accuracy"):
        training.run(small(cache_dir, checkpoint__metric="validation/acuracy"), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_start_that_failed_does_not_claim_the_workdir(tmp_path, cache_dir):
    with pytest.raises(FileNotFoundError, match="nofile"):
        training.run(small(cache_dir, data__train="nofile.jsonl"), tmp_path)
    resume.check_workdir(small(cache_dir), tmp_path)


def test_whole_epochs_show_every_group_equally_often(cache_dir, tmp_path):
    config = small(cache_dir, duration="3 epochs", plan__window=16)
    groups, _ = prepare.read_groups(config, prepare.open_chat(config, tmp_path), objectives.make(config.objective).task)
    for count in range(40, 150, 5):
        plan = prepare.plan_training(config, groups.select(range(count)))
        assert (np.bincount(plan.groups) == 3).all()


def test_epochs_mean_the_data_not_the_run(cache_dir, tmp_path):
    config = small(cache_dir, duration="0.5 epochs")
    groups, _ = prepare.read_groups(config, prepare.open_chat(config, tmp_path), objectives.make(config.objective).task)
    plan = prepare.plan_training(config, groups)
    assert prepare.steps_in("1 epochs", plan) == plan.steps_per_epoch > plan.steps
    assert prepare.steps_in("50%", plan) == round(plan.steps / 2 + 0.01) and prepare.steps_in("0%", plan, least=0) == 0


def test_evaluation_computes_no_more_rows_than_it_has(cache_dir, tmp_path):
    config = small(cache_dir)
    _, validation = prepare.read_groups(
        config, prepare.open_chat(config, tmp_path), objectives.make(config.objective).task
    )
    split = prepare.plan_evaluations(config, {"v": validation}, 1, 300)["v"]
    assert split.shape.micro * split.shape.rows == sum(len(split.plan.rows(s)) for s in range(split.plan.steps))


def test_the_best_evaluation_is_kept_and_exported_whatever_is_saved_between(tmp_path, cache_dir):
    config = small(cache_dir, checkpoint__every="3 steps", eval__every="4 steps", optim__learning_rate=0.05)
    training.run(config, tmp_path)
    lines = [line for line in metrics(tmp_path) if "validation/accuracy" in line and line["step"] > 0]
    best = max(lines, key=lambda line: (line["validation/accuracy"], -line["step"]))
    contract = json.loads((tmp_path / "export" / "reward_contract.json").read_text())
    assert contract["metrics"]["step"] == best["step"]


def test_the_login_of_wandb_is_checked_before_the_data_is_read(tmp_path, cache_dir, monkeypatch):
    def refuse(project):
        raise ValueError(f"nobody is logged in for {project}")

    wandb = importlib.import_module("rmjax.train.sinks.wandb")

    installed = types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda name: name))
    monkeypatch.setattr(config_lib, "importlib", installed)
    monkeypatch.setattr(wandb, "check", refuse)
    monkeypatch.setattr(prepare, "read_groups", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(ValueError, match="nobody is logged in for rewards"):
        training.run(small(cache_dir, log__to="wandb", log__project="rewards"), tmp_path)


@pytest.mark.parametrize(
    "values,said",
    [
        ({"model__remat": "foo"}, "remat 'foo'"),
        ({"duration": "10%"}, "not a share of itself"),
        ({"eval__every": "0 steps"}, "must be above 0"),
        ({"checkpoint__keep_best": 0}, "needs config.checkpoint.keep_best"),
        ({"optim__freezes": ((".*", True),)}, "nothing would be trained"),
        ({"log__to": "mlflow"}, "config.log.to has mlflow, which needs a package: "),
    ],
)
def test_what_cannot_work_is_refused_before_the_data_is_read(values, said, tmp_path, cache_dir, monkeypatch):
    monkeypatch.setattr(prepare, "read_groups", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(ValueError, match=said):
        training.run(small(cache_dir, **values), tmp_path)

"""Runs of reinforcement learning as processes of their own: what they leave, and what they survive."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import quick
import small_runs
import small_sets

from rmjax.batches.chat import Chat
from rmjax.data import synthetic
from rmjax.export import __main__ as export
from rmjax.export import from_run
from rmjax.inference import contract, runs
from rmjax.inference.generation import GenerativeModel
from rmjax.inference.sampler import Drawing, Prompt
from rmjax.judging import rewards

pytestmark = pytest.mark.slow

SMALL = {  # the demo made small: it starts from what knows the form of a verdict, and hardly more
    **{"start.duration": "60 steps", "start.data.train": "synthetic://ratings?n=1200&seed=0"},
    **{"start.data.validation": "synthetic://ratings?n=40&seed=1", "start.eval.every": "60 steps"},
    **{"start.log.report": False, "start.log.to": "", "start.eval.train_groups": 0},
    **{"start.gate.convergence": 0.0, "start.gate.accuracy": 0.0},
    **{"data.train": "synthetic://ratings?n=60&seed=0", "data.validation": "synthetic://ratings?n=20&seed=1"},
    **{
        "duration": "6 steps",
        "optim.warmup": "2 steps",
        "eval.every": "3 steps",
        "eval.samples": 2,
        "eval.train_groups": 0,
    },
    **{"checkpoint.every": "2 steps", "checkpoint.keep_latest": 6, "log.every": "1 steps"},
    **{"rollout.prompts_per_step": 6, "rollout.samples": 4, "rollout.max_tokens": 16, "plan.row_tokens": 128},
    **{"log.to": "", "gate.accuracy": 0.0, "gate.unreadable": 0.0, "gate.cut_off": 0.0},
}


def run(workdir, cache, **values):
    return small_runs.Started(workdir, cache, config="configs/grpo_tiny.py", small=SMALL, **values)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def done(tmp_path_factory, cache):
    """A run that nothing has disturbed."""
    workdir = tmp_path_factory.mktemp("done") / "run"
    text = run(workdir, cache).finish()
    assert "config.start is run first" in text
    return workdir


def begun(done, workdir):
    """A workdir in which config.start is done, as it is in `done`."""
    workdir.mkdir()
    shutil.copytree(done / "start", workdir / "start")
    shutil.copy(done / ".rmjax.json", workdir)
    return workdir


def rollouts(workdir):
    return {path.name: path.read_bytes() for path in sorted((workdir / "rollouts").glob("*.jsonl"))}


def same(a, b):
    small_runs.same_run(a, b)
    assert rollouts(a) == rollouts(b)


def test_a_run_leaves_its_samples_and_measures_them(done):
    assert sorted(rollouts(done)) == [f"{step}.jsonl" for step in range(6)]
    lines = [line for line in small_runs.metrics(done) if "train/reward_mean" in line]
    assert [line["step"] for line in lines] == list(range(1, 7))
    names = (
        "reward_std",
        "dead",
        "unreadable",
        "cut_off",
        "answer_tokens",
        "entropy",
        "mismatch",
        "ratio_max",
        "shared",
    )
    for line in lines:
        assert not [name for name in names if line.get(f"train/{name}") is None], line
        assert line["train/mismatch"] < 1e-9 and abs(line["train/ratio_max"] - 1) < 1e-4
        assert line["train/unreadable"] < 0.5  # the start knows the form
    before, *_ = small_runs.column(done, "validation/accuracy")
    assert 0 < before < 1
    assert {"validation/mae_of_mean", "validation/unreadable"} <= small_runs.metrics(done)[0].keys()
    evaluation = json.loads((done / "evaluation.json").read_text())
    assert evaluation["sets"]["validation"]["kind"] == "judgements"
    assert "accuracy_greedy" in evaluation["sets"]["validation"]["metrics"]
    page = (done / "report.html").read_text()
    assert "Samples of step 5" in page and "Questions that teach nothing" in page


def test_the_export_is_a_judge_that_writes(done):
    contract = json.loads((done / "export" / "reward_contract.json").read_text())
    assert contract["objective"]["name"] == "sft" and contract["objective"]["target"] == "score"
    assert runs.open_checkpoint(runs.find(done)).model.objective.task.target == "score"


def test_a_step_is_drawn_with_the_parameters_that_it_changes(done):
    """Step 4's samples are those of checkpoint 4, bit for bit: nothing is stale."""
    opened = runs.open_checkpoint(runs.find(done / "checkpoints" / "4"))
    model = GenerativeModel.of(runs.reward_model(opened.model, opened.chat, opened.params))
    lines = [json.loads(line) for line in rollouts(done)["4.jsonl"].splitlines()]
    sampler = model.sampler(Drawing(responses=4, max_tokens=16), groups=6)
    prompts = [Prompt(line["prompt"], 4 * 3 * 6 + i) for i, line in enumerate(lines)]
    found = dict(sampler.responses(prompts))
    for i, line in enumerate(lines):
        for response, said in zip(found[i], line["responses"], strict=True):
            assert response.tokens.tolist() == said["tokens"]
            np.testing.assert_allclose(response.log_probs, said["log_probs"], atol=2e-6)
    older = runs.open_checkpoint(runs.find(done / "checkpoints" / "2"))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), opened.params, older.params)
    assert any(jax.tree.leaves(changed))


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.release)])
def test_a_killed_run_ends_with_the_same_bytes(done, cache, tmp_path, number):
    """While the samples of step 3 or a later one are drawn."""
    workdir = begun(done, tmp_path / "run")
    started = run(workdir, cache)
    drawn, saved = (workdir / "rollouts" / "3.jsonl").exists, lambda: 2 in small_runs.checkpoints(workdir)
    assert started.send_when(number, lambda: drawn() and saved())
    started.end()
    assert not (workdir / "export").exists()
    text = run(workdir, cache).finish()
    assert "continuing from step" in text
    same(workdir, done)


def test_its_own_samples_from_a_file_make_the_same_run(done, cache, tmp_path):
    workdir = begun(done, tmp_path / "run")
    run(workdir, cache, **{"rollout.source": str(done / "rollouts"), "log.report": False}).finish()
    assert (workdir / "metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()


def test_a_run_goes_on_within_a_rollout(done, cache, tmp_path):
    """Two updates a rollout, and a kill after the first of them."""
    values = {"objective.updates": 2, "checkpoint.every": "1 steps", "log.report": False}
    whole = begun(done, tmp_path / "whole")
    run(whole, cache, **values).finish()
    workdir = begun(done, tmp_path / "run")
    started = run(workdir, cache, **values)
    assert started.send_when(signal.SIGKILL, lambda: 3 in small_runs.checkpoints(workdir))
    started.end()
    assert "continuing from step" in run(workdir, cache, **values).finish()
    same(workdir, whole)


def nothing_is_worth_anything():
    from rmjax.judging import rewards

    rewards.REWARDS["exact"] = lambda answer: 0.0


def the_expected_is_worth_more():
    from rmjax.judging import rewards

    @rewards.register("expected", columns=("expected", "meta.worth"))
    def expected(answer):
        return answer.columns["meta.worth"] * (answer.verdict.value == answer.columns["expected"]["score"])


def test_a_reward_of_ones_own_reads_columns_and_a_benchmark_may_be_of_the_training_data(done, cache, tmp_path):
    """What a row expects is the other rating than its label, so the reward cannot be of that; and the run is opened
    where nobody knows its reward."""
    rows = [
        {**row, "expected": {"score": 6 - row["score"], "why": "An expert said so to us."}, "meta": {"worth": 0.5}}
        for row in synthetic.rows("ratings", n=60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [row["prompt"] for row in rows[:6]] + ["Why not?", "And then?"]
    values = {"data.train": str(tmp_path / "rows.jsonl"), "objective.reward": "expected", "duration": "2 steps"}
    values["log.report"] = False
    values["eval.benchmarks"] = f"judge_bench={small_sets.judge_bench(tmp_path / 'bench.jsonl', questions)}"
    workdir = begun(done, tmp_path / "run")
    text = run(workdir, cache, spoil=the_expected_is_worth_more, **{**values, "eval.every": "2 steps"}).finish()
    assert "judge_bench: 6 of its 8 prompts are in the training data, so its numbers mislead" in text
    lines = [json.loads(line) for step in range(2) for line in rollouts(workdir)[f"{step}.jsonl"].splitlines()]
    found = [(line["label"], response) for line in lines for response in line["responses"] if response["readable"]]
    assert all(r["reward"] == 0.5 * (r["verdict"] == 6 - label) for label, r in found)
    assert {r["reward"] for _, r in found} == {0.0, 0.5}
    assert small_runs.column(workdir, "judge_bench/overall").size == 2
    assert "expected" not in rewards.REWARDS
    exported = tmp_path / "export"
    from_run.export_and_push(export_command(f"--run={workdir}", f"--output={exported}"))
    assert "validation/accuracy" in contract.read(exported)["metrics"]


def export_command(*argv):
    return from_run.checked(export.parser().parse_args(list(argv)))


def test_another_checkpoint_is_exported_with_the_metrics_of_its_own_evaluation(done, tmp_path):
    """Not with those of its step's training, which stand in metrics.jsonl as well; and with none where it has none."""
    best = contract.read(done / "export")["metrics"]
    (other,) = {3, 6} - {int(best["step"])}
    said = from_run.export_and_push(export_command(f"--run={done}", f"--output={tmp_path / 'a'}", f"--step={other}"))
    found = contract.read(tmp_path / "a")["metrics"]
    (line,) = [x for x in small_runs.metrics(done) if x["step"] == other and "validation/accuracy" in x]
    assert found == line and found.keys() == best.keys() and not any("was not evaluated" in x for x in said)
    assert any(x["step"] == other and "train/loss" in x for x in small_runs.metrics(done))
    said = from_run.export_and_push(export_command(f"--run={done}", f"--output={tmp_path / 'b'}", "--step=2"))
    assert contract.read(tmp_path / "b")["metrics"] == {"step": 2} and said[1].startswith("step 2 was not evaluated")


def test_dead_questions_move_nothing(done, cache, tmp_path):
    """Not even by weight decay or momentum."""
    workdir = begun(done, tmp_path / "run")
    values = {"duration": "2 steps", "optim.weight_decay": 0.1, "log.report": False, "objective.kl": 0.0}
    run(workdir, cache, spoil=nothing_is_worth_anything, **values).finish()
    assert small_runs.column(workdir, "train/dead").tolist() == [1.0, 1.0]
    start = (workdir / "start" / "export" / "model.safetensors").read_bytes()
    assert (workdir / "export" / "model.safetensors").read_bytes() == start


def test_eight_devices_train_as_one(done, cache, tmp_path):
    """The same answers, and the same numbers but for rounding."""
    workdir = begun(done, tmp_path / "run")
    flags = "--xla_force_host_platform_device_count=8"
    values = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "log.report": False}
    run(workdir, cache, xla_flags=f"{flags} --xla_backend_optimization_level=0", **values).finish()
    for name in ("train/reward_mean", "train/answer_tokens", "train/loss", "train/grad_norm"):
        np.testing.assert_allclose(
            small_runs.column(workdir, name), small_runs.column(done, name), rtol=2e-3, atol=1e-5, err_msg=name
        )


def test_a_chat_template_is_asked_for_an_answer(done):
    """Prompts are renderings up to where the answer begins, which the imitation that came before had answered."""
    opened = runs.open_checkpoint(runs.find(done))
    line = json.loads(rollouts(done)["0.jsonl"].splitlines()[0])
    chat: Chat = opened.chat
    assert line["question"] == chat.tokenizer.decode(line["prompt"])
    assert chat.render_prompt([{"role": "user", "content": "x"}]).endswith(line["question"][-10:])


def test_several_processes_each_draw_a_share_and_train_alike(done, cache, tmp_path):
    """By launch/local.sh; what is drawn does not depend on how many draw it."""
    workdir = begun(done, tmp_path / "run")
    keys = {**SMALL, "data.cache_dir": str(cache)}
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.FLAGS, "PYTHON": sys.executable, "RESTARTS": "1"}
    result = subprocess.run(
        [small_runs.ROOT / "launch" / "local.sh", "2", "configs/grpo_tiny.py", f"--workdir={workdir}"]
        + [f"--config.{key}={value}" for key, value in keys.items()],
        env=env, cwd=small_runs.ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "mesh: data 1 x fsdp 2 x tensor 1 on 2 devices" in result.stdout
    for step in range(6):
        here, there = (
            [json.loads(line) for line in (path / "rollouts" / f"{step}.jsonl").read_text().splitlines()]
            for path in (workdir, done)
        )
        assert [line["id"] for line in here] == [line["id"] for line in there]
        for one, other in zip(here, there):
            tokens = [[response["tokens"] for response in line["responses"]] for line in (one, other)]
            assert tokens[0] == tokens[1]
            found = [np.concatenate([r["log_probs"] for r in line["responses"]]) for line in (one, other)]
            np.testing.assert_allclose(*found, rtol=0, atol=1e-4)
    loss, mismatch = (small_runs.column(path, "train/loss") for path in (workdir, done)), "train/mismatch"
    np.testing.assert_allclose(*loss, rtol=0, atol=1e-4)
    assert small_runs.column(workdir, mismatch).max() < 1e-9

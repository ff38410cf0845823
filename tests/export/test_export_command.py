"""Exports of a run's checkpoints by the command, and checkpoints that are opened without one."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_runs import Started

from rmjax.export import __main__ as export_command
from rmjax.export import from_run, verify
from rmjax.inference import contract, runs
from rmjax.inference.reward_model import RewardModel, load_checked
from rmjax.models import hf
from rmjax.runtime import command_line, exits
from rmjax.runtime.ownership import MARKER

pytestmark = pytest.mark.slow
TALK = [
    [{"role": "user", "content": "Tell me about the river."}, {"role": "assistant", "content": f"Every {x} is deep."}]
    for x in ("river", "garden", "old lake")
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of 20 steps, whose rewards have spread out."""
    workdir = tmp_path_factory.mktemp("export") / "run"
    # With the flags of this process, which exports its checkpoints to the same bytes.
    Started(workdir, tmp_path_factory.mktemp("cache"), xla_flags="", optim__learning_rate=1e-2).finish()
    return workdir


def command(*argv):
    return from_run.checked(export_command.parser().parse_args(list(argv)))


def test_any_checkpoint_is_opened_and_scores_as_its_export(run, tmp_path):
    step = runs.open_checkpoint(runs.find(run)).step
    opened = runs.open_checkpoint(runs.find(run / "checkpoints" / str(step)))
    ours = runs.reward_model(opened.model, opened.chat, opened.params, "float32").score(TALK)
    assert ours == pytest.approx(RewardModel.load(run / "export", dtype="float32").score(TALK), abs=1e-5)
    from_run.export_and_push(command(f"--run={run}", f"--output={tmp_path / 'again'}", f"--step={step}"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "export" / name).read_bytes(), name
    before, again = (contract.read(directory) for directory in (run / "export", tmp_path / "again"))
    assert again == before  # golden scores and intervals, too
    assert runs.find(run / "export") is None and runs.find(tmp_path) is None


def test_options_of_the_weights(run, tmp_path):
    directory = tmp_path / "small"
    from_run.export_and_push(
        command(f"--run={run}", f"--output={directory}", "--dtype=bfloat16", "--max_shard_gb=0.00002")
    )
    assert hf.read_config(directory)["dtype"] == "bfloat16" and len(list(directory.glob("*.safetensors"))) > 1
    full = RewardModel.load(run / "export", dtype="float32").score(TALK)
    assert load_checked(directory, dtype="float32").score(TALK) == pytest.approx(full, abs=0.1)


def test_unit_deviation_is_in_the_head(run, tmp_path):
    from_run.export_and_push(command(f"--run={run}", f"--output={tmp_path / 'unit'}", "--unit_std"))
    before, after = contract.read(run / "export"), contract.read(tmp_path / "unit")
    std = before["reward_std"]
    ours, scaled = (RewardModel.load(d, dtype="float32").score(TALK) for d in (run / "export", tmp_path / "unit"))
    assert scaled == pytest.approx(np.array(ours) / std, rel=1e-5)
    assert after["reward_std"] == 1 and after["reward_scale"] == std
    assert after["reward_mean"] == pytest.approx(before["reward_mean"] / std)
    mean, deviation = contract.normalization(after)
    assert (np.array(scaled) - mean) / deviation == pytest.approx(
        (np.array(ours) - before["reward_mean"]) / std, rel=1e-5
    )


def test_what_cannot_be_exported_is_named(run, tmp_path):
    for argv, words in (
        (["--run=nowhere", "--output=x"], "is no run of rmjax"),
        ([f"--run={run}"], "--run and --output are required"),
        ([f"--run={run}", f"--output={tmp_path}/x", "--push_to=name"], "OWNER/NAME"),
        ([f"--run={run}/checkpoints/20", f"--output={tmp_path}/x", "--step=3"], "is a checkpoint already"),
        ([f"--run={run}", f"--output={tmp_path}/x", "--step=7"], "there is no checkpoint 7 .*there is best, last"),
    ):
        with pytest.raises(ValueError, match=words):
            from_run.export_and_push(command(*argv))
    assert not (tmp_path / "x").exists()


def test_an_upload_is_of_the_whole_export(run, tmp_path, monkeypatch):
    calls = []
    hub = "rmjax.export.from_run.huggingface_hub"
    monkeypatch.setattr(f"{hub}.create_repo", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(f"{hub}.upload_folder", lambda **k: calls.append(k))
    said = from_run.export_and_push(
        command(f"--run={run}", f"--output={tmp_path / 'up'}", "--push_to=me/rewards", "--private")
    )
    assert calls[0] == (("me/rewards",), {"private": True, "exist_ok": True})
    whole = {"repo_id": "me/rewards", "folder_path": str(tmp_path / "up")}
    assert calls[1] == {**whole, "ignore_patterns": [MARKER]}  # which folder is ours is of no use there
    assert "https://huggingface.co/me/rewards" in said[1]
    assert (tmp_path / "up" / "README.md").read_text().startswith("---\n")


def test_a_hub_that_refuses_stops_it_before_anything_is_written(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise LookupError("no such owner")

    argv = (f"--run={run}", f"--output={tmp_path / 'up'}", "--push_to=me/rewards")
    monkeypatch.setattr("rmjax.export.from_run.huggingface_hub.create_repo", refuse)
    with pytest.raises(from_run.NotUploaded, match="no such owner; nothing was exported") as caught:
        from_run.export_and_push(command(*argv))
    assert not (tmp_path / "up").exists() and command_line.code_of(caught.value) == exits.FAILED
    monkeypatch.setattr("rmjax.export.from_run.huggingface_hub.create_repo", lambda *_, **__: None)
    monkeypatch.setattr("rmjax.export.from_run.huggingface_hub.upload_folder", refuse)
    with pytest.raises(from_run.NotUploaded, match=r"no such owner; the export is .*up; `hf upload me/rewards "):
        from_run.export_and_push(command(*argv))
    load_checked(tmp_path / "up")


def test_a_run_or_a_model_of_others_is_not_replaced(run, tmp_path):
    """All have a config.json or a marker; the model has none of ours."""
    other = tmp_path / "other"
    shutil.copytree(run / "export", other)
    (other / contract.FILE).unlink()
    (other / MARKER).unlink()
    checkpoints = "of the kind 'checkpoints', expected 'export'"
    for output, what in ((run, "is a run"), (other, "is not empty"), (run / "checkpoints", checkpoints)):
        before = sorted(output.iterdir())
        with pytest.raises(ValueError, match=what):
            command(f"--run={run}", f"--output={output}")
        assert sorted(output.iterdir()) == before


def test_a_step_that_was_not_evaluated_says_so(run, tmp_path):
    argv = (f"--run={run}", f"--output={tmp_path / 'out'}", "--step=18")
    with pytest.raises(ValueError, match="it was not evaluated; take another, as --step=best"):
        from_run.export_and_push(command(*argv, "--unit_std"))
    assert not (tmp_path / "out").exists()
    said = from_run.export_and_push(command(*argv))
    assert said[1].startswith("step 18 was not evaluated") and len(contract.read(tmp_path / "out")["golden"]) > 1


def test_without_the_runs_own_export_golden_rows_come_from_its_data(run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("export"))
    from_run.export_and_push(command(f"--run={moved}", f"--output={tmp_path / 'out'}"))
    before, again = (contract.read(directory) for directory in (run / "export", tmp_path / "out"))
    assert (again["golden"], again["data_fingerprint"]) == (before["golden"], before["data_fingerprint"])


def test_a_checkpoint_that_cannot_be_used_says_why(run, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    file = max(
        (path for path in (broken / "checkpoints" / "20").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"the checkpoint of step 20 in .* cannot be used: .*SHA-256 differs"):
        runs.open_checkpoint(runs.find(broken / "checkpoints" / "20"))
    shutil.rmtree(broken / "checkpoints")
    with pytest.raises(ValueError, match="has no finished checkpoint"):
        runs.open_checkpoint(runs.find(broken))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "optim": {"of_another_version": 1}}))
    with pytest.raises(ValueError, match="is of another version of rmjax"):
        runs.open_checkpoint(runs.find(broken))


def test_any_weight_of_a_trained_model_that_changes_by_a_hundredth_is_noticed(run, tmp_path):
    directory = tmp_path / "changed"
    shutil.copytree(run / "export", directory)
    path = directory / "model.safetensors"
    weights = load_file(path)
    assert len(weights) > 20
    for name, tensor in weights.items():
        assert np.abs(tensor).max() > 0, name
        save_file({**weights, name: (tensor * 1.01).astype(tensor.dtype)}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="has another norm than in the score contract"):
            load_checked(directory)
    with pytest.raises(ValueError, match="has another norm than in the score contract"):
        verify.verify(directory)  # of the last one

"""Exports of a run's checkpoints, the contract replayed by us and by transformers, and what makes it fail."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_runs import Started

from rmjax import contract, export, exporting, runs, verify
from rmjax.models import hf
from rmjax.reward_model import RewardModel, load_checked

pytestmark = pytest.mark.slow
TALK = [
    [{"role": "user", "content": "Tell me about the river."}, {"role": "assistant", "content": f"Every {x} is deep."}]
    for x in ("river", "garden", "old lake")
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of 20 steps, whose rewards have spread out."""
    workdir = tmp_path_factory.mktemp("export") / "run"
    Started(workdir, tmp_path_factory.mktemp("cache"), optim__learning_rate=1e-2).finish()
    return workdir


def command(*argv):
    return exporting.checked(export.parser().parse_args(list(argv)))


def test_any_checkpoint_is_opened_and_scores_as_its_export(run, tmp_path):
    step = runs.open_checkpoint(runs.find(run)).step
    opened = runs.open_checkpoint(runs.find(run / "checkpoints" / str(step)))
    ours = runs.reward_model(opened, "float32").score(TALK)
    assert ours == pytest.approx(RewardModel.load(run / "export", dtype="float32").score(TALK), abs=1e-5)
    exporting.export_and_push(command(f"--run={run}", f"--output={tmp_path / 'again'}", f"--step={step}"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "export" / name).read_bytes(), name
    before, again = (contract.read(directory) for directory in (run / "export", tmp_path / "again"))
    assert again == before  # golden scores and intervals, too
    assert runs.find(run / "export") is None and runs.find(tmp_path) is None


def test_options_of_the_weights(run, tmp_path):
    directory = tmp_path / "small"
    exporting.export_and_push(
        command(f"--run={run}", f"--output={directory}", "--dtype=bfloat16", "--max_shard_gb=0.00002")
    )
    assert hf.read_config(directory)["dtype"] == "bfloat16" and len(list(directory.glob("*.safetensors"))) > 1
    full = RewardModel.load(run / "export", dtype="float32").score(TALK)
    assert load_checked(directory, dtype="float32").score(TALK) == pytest.approx(full, abs=0.1)


def test_unit_deviation_is_in_the_head(run, tmp_path):
    exporting.export_and_push(command(f"--run={run}", f"--output={tmp_path / 'unit'}", "--unit_std"))
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
            exporting.export_and_push(command(*argv))
    assert not (tmp_path / "x").exists()


def test_an_upload_is_of_the_whole_export(run, tmp_path, monkeypatch):
    calls = []
    hub = "rmjax.exporting.huggingface_hub"
    monkeypatch.setattr(f"{hub}.create_repo", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(f"{hub}.upload_folder", lambda **k: calls.append(k))
    said = exporting.export_and_push(
        command(f"--run={run}", f"--output={tmp_path / 'up'}", "--push_to=me/rewards", "--private")
    )
    assert calls[0] == (("me/rewards",), {"private": True, "exist_ok": True})
    assert calls[1] == {"repo_id": "me/rewards", "folder_path": str(tmp_path / "up")}
    assert "https://huggingface.co/me/rewards" in said[1]
    assert (tmp_path / "up" / "README.md").read_text().startswith("---\n")


def test_transformers_replays_the_contract_and_that_is_recorded(run, tmp_path):
    directory = tmp_path / "export"
    shutil.copytree(run / "export", directory)
    lines = verify.verify(directory)
    assert "transformers" in lines[0] and lines[-1].startswith("all agree")
    told = contract.read(directory)["verified"]
    assert [x["by"].split()[0] for x in told] == ["rmjax", "transformers"]
    assert all(x["largest_difference"] < contract.TOLERANCE for x in told)


def test_vllm_is_asked_where_it_is_installed(run, tmp_path, monkeypatch):
    """With a stand-in that answers as its documentation says; vLLM itself is not here."""
    import types

    golden = contract.read(run / "export")["golden"]
    asked = {}

    class LLM:
        def __init__(self, **options):
            asked.update(options)

        def encode(self, prompts, **options):
            asked.update(options)
            by_ids = {tuple(row["token_ids"]): row["outputs"][0] for row in golden}
            data = [by_ids[tuple(prompt["prompt_token_ids"])] for prompt in prompts]
            return [types.SimpleNamespace(outputs=types.SimpleNamespace(data=x)) for x in data]

    stand_in = types.SimpleNamespace(LLM=LLM, PoolingParams=lambda **k: k, __version__="0")
    monkeypatch.setitem(__import__("sys").modules, "vllm", stand_in)
    found = verify.with_vllm(run / "export", golden)
    contract.check_outputs(contract.read(run / "export"), found)
    assert asked["runner"] == "pooling" and asked["pooling_params"] == {"use_activation": False}


# What makes it fail


def changed(run, tmp_path):
    directory = tmp_path / "changed"
    shutil.copytree(run / "export", directory)
    return directory


def test_one_character_of_the_template_is_enough(run, tmp_path):
    directory = changed(run, tmp_path)
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_end|> ", 1))
    for replay in (load_checked, verify.verify):
        with pytest.raises(ValueError, match="the tokenizer's chat template is not the one it was trained with"):
            replay(directory)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_so_is_the_pad_token(file, run, tmp_path):
    directory = changed(run, tmp_path)
    values = json.loads((directory / file).read_text())
    if file == "config.json":
        values["pad_token_id"] += 1
    else:
        values["pad_token"] = "<|im_end|>"
    (directory / file).write_text(json.dumps(values))
    for replay in (load_checked, verify.verify):
        with pytest.raises(ValueError, match="pad_token_id"):
            replay(directory)


def test_so_is_any_weight_that_changes_by_a_hundredth(run, tmp_path):
    directory = changed(run, tmp_path)
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


def test_golden_rows_alone_notice_what_keeps_every_norm(run, tmp_path):
    directory = changed(run, tmp_path)
    path = directory / "model.safetensors"
    weights = load_file(path)
    turned = {**weights, "score.weight": -weights["score.weight"]}
    save_file(turned, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="golden row 0 scores"):
        load_checked(directory)

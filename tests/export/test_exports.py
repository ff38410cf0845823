"""What each objective exports: transformers loads it with the outputs that the contract says, and `score` reads it."""

import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers

from rmjax.data import formats
from rmjax.data.records import pair
from rmjax.evaluate import __main__ as evaluate
from rmjax.export import verify
from rmjax.inference import contract, reward_model, runs
from rmjax.models import hf
from rmjax.objectives.pairwise import average_orders
from rmjax.score import __main__ as score
from rmjax.train import training

ROOT = Path(__file__).parents[2]
CONFIGS = ("bt_tiny", "bt_rankings_tiny", "pointwise_tiny", "pairwise_tiny", "sft_tiny", "prm_tiny")
pytestmark = pytest.mark.slow


def asked(text):
    return {"role": "user", "content": text}


def answered(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.release if name == "bt_rankings_tiny" else ()) for name in CONFIGS],
)
def exported(request, tmp_path_factory):
    """The name of a config and the export of three of its steps."""
    config = runpy.run_path(str(ROOT / "configs" / f"{request.param}.py"))["get_config"]()
    config.duration, config.eval.every = "3 steps", "3 steps"
    config.log.to, config.eval.train_groups, config.data.workers = "", 0, 0
    config.data.train, config.data.validation = (
        re.sub(r"n=\d+", "n=120", spec) for spec in (config.data.train, config.data.validation)
    )
    config.data.cache_dir = str(tmp_path_factory.mktemp("cache"))
    workdir = tmp_path_factory.mktemp(request.param)
    training.run(config, workdir)
    return request.param, workdir / "export"


def hf_logits(directory, kind, ids):
    """What transformers' class makes of token ids: logits [1, T or nothing, A], in float32."""
    import torch

    auto = getattr(transformers, f"AutoModelFor{kind}")
    model, notes = auto.from_pretrained(str(directory), dtype=torch.float32, output_loading_info=True)
    assert not any(notes[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    with torch.no_grad():
        return model.eval()(torch.tensor([ids]))


def test_golden_rows_in_transformers(exported):
    import torch

    name, directory = exported
    terms, values = contract.read(directory), hf.read_config(directory)
    kind = values["architectures"][0].partition("For")[2]
    assert len(terms["golden"]) > 1
    for row in terms["golden"]:
        ids, outputs = row["token_ids"], np.array(row["outputs"])
        logits = hf_logits(directory, kind, ids).logits.numpy()
        if kind == "CausalLM":
            loss = torch.nn.functional.cross_entropy(torch.tensor(logits[0, :-1]), torch.tensor(ids[1:]))
            np.testing.assert_allclose(outputs, [[loss.item()]], atol=1e-4)
        elif kind == "TokenClassification":
            np.testing.assert_allclose(outputs, logits[0, row["at"]], atol=1e-4)
        else:
            assert row["at"] == [len(ids) - 1]
            np.testing.assert_allclose(outputs, logits, atol=1e-4)
    if kind != "CausalLM":
        assert outputs.shape[1] == len(terms["labels"]) == values["num_labels"]
        assert [values["id2label"][str(i)] for i in range(values["num_labels"])] == terms["labels"]
    if name == "prm_tiny":
        assert any(len(row["at"]) > 1 for row in terms["golden"])


def test_its_checkpoint_gives_the_same_outputs(exported):
    _, directory = exported
    opened = runs.open_checkpoint(runs.find(directory.parent))
    golden = contract.read(directory)["golden"]
    for row, outputs in zip(
        golden, runs.reward_model(opened.model, opened.chat, opened.params, "float32").replay(golden), strict=True
    ):
        np.testing.assert_allclose(outputs, row["outputs"], atol=1e-5)
    assert verify.verify(directory)[-1].startswith("all agree with the contract")


def test_the_score_command_reads_it(exported, tmp_path):
    import torch

    name, directory = exported
    model = reward_model.load_checked(directory)
    rows = {
        "prm_tiny": [{"prompt": "Say why.", "completions": ["First.", "Then.", "So."]}],
        "pairwise_tiny": [{"prompt": "Say why.", "response_a": "Never.", "response_b": "Often."}],
    }.get(name, [{"prompt": "Say why.", "response": "Always."}])
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if name == "sft_tiny":
        with pytest.raises(ValueError, match="writes its verdicts"):
            score.run(str(directory), str(source), output)
        return
    read, counts = score.run(str(directory), str(source), output)
    assert (read, counts["rows"]) == (1, 1)
    (found,) = [json.loads(line) for line in output.read_text().splitlines()]
    added = {key: value for key, value in found.items() if key not in rows[0]}
    if name == "prm_tiny":
        (wanted,) = model.steps([[asked("Say why.")]], [rows[0]["completions"]])
        assert len(wanted) == 3 and added == {"scores": pytest.approx(wanted, abs=1e-5)}
        ids = model.chat.encode([model.chat.render([asked("Say why."), answered("First.\nThen.\nSo.")])])[0]
        logits = hf_logits(directory, "TokenClassification", ids).logits[0]
        right = torch.softmax(logits, -1)[:, 1].numpy()
        layout = formats.detect([{**rows[0], "labels": [1, 1, 0]}])
        (record,) = layout.read({**rows[0], "labels": [1, 1, 0]}, source="", where="")
        (example,) = model.objective.task.examples(record)
        tree = model.chat.groups([example])[0].tree  # as in training
        assert tree.sequences()[-1].tolist() == ids[: int(tree.end[-1]) + 1]
        np.testing.assert_allclose(wanted, right[tree.end], atol=1e-4)
    elif name == "pairwise_tiny":
        assert set(added) == {"A", "B", "tie"} and sum(added.values()) == pytest.approx(1, abs=1e-5)
        examples = model.objective.task.examples(
            pair(*([asked("Say why."), answered(a)] for a in ("Never.", "Often.")))
        )
        both = [model.chat.encode([model.chat.render(c)])[0] for c in examples[0].conversations]
        orders = [hf_logits(directory, "SequenceClassification", ids).logits.softmax(-1)[0].numpy() for ids in both]
        np.testing.assert_allclose(list(added.values()), average_orders(*orders), atol=1e-4)
    else:
        conversation = [asked("Say why."), answered("Always.")]
        assert added == pytest.approx({k: float(v[0]) for k, v in model.values([conversation]).items()}, abs=1e-5)
        assert model.score([conversation]) == [pytest.approx(added["score"], abs=1e-5)]


MEASURED = {  # the kind of its sets, a metric that is its own, and one that is the loop's (which counts ties, too)
    "bt_tiny": ("preferences", "longer_is_better", "accuracy"),
    "bt_rankings_tiny": ("preferences", "longer_is_better", ""),
    "pointwise_tiny": ("attributes", "mse", "mse/relevance"),
    "pairwise_tiny": ("preferences", "consistency", ""),
    "prm_tiny": ("steps", "first_error_accuracy", "accuracy"),
    "sft_tiny": ("tokens", "verdict_accuracy", "accuracy"),
}


def test_it_is_measured_in_its_run_and_alike_by_the_command(exported, tmp_path):
    name, directory = exported
    kind, own, of_loop = MEASURED[name]
    workdir, out = directory.parent, tmp_path / "found.json"
    assert (workdir / "report.html").exists()
    inside = json.loads((workdir / "evaluation.json").read_text())["sets"]["validation"]
    assert inside["kind"] == kind and inside["metrics"][own]["value"] is not None
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "validation/loss" in line)
    if of_loop:
        assert inside["metrics"][of_loop]["value"] == pytest.approx(last[f"validation/{of_loop}"], abs=1e-4)
    data = json.loads((workdir / "config.json").read_text())["data"]["validation"]
    evaluate.main([f"--model={directory}", f"--data={data}", f"--output={out}"])
    (found,) = [x for x in json.loads(out.read_text())["sets"].values() if x["kind"] == kind]
    assert found["metrics"][own]["value"] == pytest.approx(inside["metrics"][own]["value"], abs=1e-3)


def test_calls_of_another_kind_say_what_to_call(exported):
    name, directory = exported
    model = reward_model.RewardModel.load(directory)
    conversation = [asked("Say why."), answered("Always.")]
    if name != "prm_tiny":
        with pytest.raises(ValueError, match=r"call|writes"):
            model.steps([conversation[:1]], [["Always."]])
    if name != "pairwise_tiny":
        with pytest.raises(ValueError, match="does not compare responses"):
            model.judge([conversation], [conversation])
    if name in ("prm_tiny", "pairwise_tiny", "sft_tiny"):
        with pytest.raises(ValueError, match=r"call `steps`|call `judge`|writes its verdicts"):
            model.score([conversation])


def test_what_an_objective_learns_itself_survives_a_restart(tmp_path):
    config = runpy.run_path(str(ROOT / "configs" / "bt_tiny.py"))["get_config"]()
    config.data.train, config.data.validation = "synthetic://pairs?n=600", "synthetic://pairs?n=60&seed=1"
    config.data.cache_dir, config.log.to, config.eval.train_groups = str(tmp_path / "cache"), "", 0
    config.objective.ties, config.duration, config.eval.every = "davidson", "4 steps", "4 steps"
    config.checkpoint.every, config.optim.warmup, config.export.step = "2 steps", "0 steps", "last"
    workdir = tmp_path / "run"
    training.run(config, workdir)
    first = contract.read(workdir / "export")
    shutil.rmtree(workdir / "export")
    shutil.rmtree(workdir / "checkpoints" / "4")
    training.run(config, workdir)
    again = contract.read(workdir / "export")
    assert again["objective_params"] == first["objective_params"] and first["objective_params"]["tie"] != 0
    assert again["golden"] == first["golden"]

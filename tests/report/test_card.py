"""The model card: its metadata as huggingface_hub reads it, and what it says of each objective."""

import ast
import re

import pytest
from huggingface_hub import ModelCard
from made_up_evaluations import KINDS, evaluation

from rmjax.config import OBJECTIVES, defaults, filled
from rmjax.evaluate import gate
from rmjax.models.families import FAMILIES
from rmjax.report import card

KIND = {
    "bradley_terry": "preferences",
    "pairwise": "preferences",
    "pointwise": "attributes",
    "prm": "steps",
    "sft": "tokens",
}
TASK = {"prm": "token-classification", "sft": "text-generation"}


def made(objective="bradley_terry", **more):
    config = filled(defaults(objective)).to_dict()
    config["data"]["train"] = (
        "hf://datasets/Anthropic/hh-rlhf/train.parquet,hf://datasets/nvidia/HelpSteer2@main/*,own.jsonl"
    )
    contract = {
        "objective": {"name": objective},
        "scored_token": "the last token",
        **{"labels": ["LABEL_0"], "decoding": "the output is the reward", "template_kwargs": {"date": "1 May"}},
        **{"max_length": 4096, "over_long": "drop", "reward_mean": 0.3, "reward_std": 1.9, "data_fingerprint": "abc"},
    }
    model = {"architectures": ["Qwen2ForSequenceClassification"], "model_type": "qwen2", "num_hidden_layers": 28}
    given = {"config": config, "contract": contract, "model": model, "evaluation": evaluation(KIND[objective]), **more}
    return card.text("me/rewards", **given)


EXPORTED = [name for name in OBJECTIVES if name != "grpo"]  # which exports a judge as `sft` does


@pytest.mark.parametrize("objective", EXPORTED)
def test_the_hub_reads_the_metadata_of_every_objective(objective):
    read = ModelCard(made(objective, base_model="Qwen/Qwen2.5-7B-Instruct"))
    data = read.data
    assert (data.library_name, data.base_model) == ("transformers", "Qwen/Qwen2.5-7B-Instruct")
    assert data.pipeline_tag == TASK.get(objective, "text-classification")
    assert data.datasets == ["Anthropic/hh-rlhf", "nvidia/HelpSteer2"]
    assert "rmjax" in data.tags and ("reward-model" in data.tags) == (objective != "sft")
    measured = KINDS[KIND[objective]]()["metrics"]
    found = {(x.dataset_name, x.metric_type): x.metric_value for x in data.eval_results}
    assert data.model_name == "me/rewards"
    for name, value in measured.items():
        if name not in card.BASELINES:
            assert found["validation", name] == pytest.approx(value["value"], abs=1e-6)
    assert not any(name == "train_slice" for name, _ in found)
    assert (("reward_bench", "Chat Hard") in found) == (KIND[objective] == "preferences")


def test_what_is_not_known_is_left_out():
    read = ModelCard(made(evaluation=None, config={"objective": {}, "data": {"train": "own.jsonl"}}))
    assert read.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert "Nothing was measured." in read.text and "quality gate" not in read.text
    with pytest.raises(ValueError, match="no card for the objective 'dpo', only for bradley_terry"):
        made(contract={"objective": {"name": "dpo"}})


def test_the_card_has_metrics_with_intervals_and_limits():
    text = made(parameters=7_615_616_512)
    assert "| Accuracy | 86.0% (84.0% to 88.0%) | 91.0% (89.0% to 93.0%) |" in text
    assert "| overall | 78.0% (76.0% to 80.0%) |" in text
    assert "| parameters | 7,615,616,512 |" in text
    assert "| `optim.learning_rate` | `1e-05` |" in text and "| `objective.ties` | `skip` |" in text
    limits = text.split("## Limits")[1]
    for said in ("the last token", '`{"date": "1 May"}`', "at most 4,096 tokens", "left out", "Between prompts", "0.3"):
        assert said in limits, said
    assert "Shorter (length difference): accuracy 71.0%" in limits and "The data lacks refusals-dangerous." in text


@pytest.mark.parametrize("objective", EXPORTED)
def test_code_of_the_card_is_python_and_rewards_stay_raw(objective):
    text = made(objective)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks and all(ast.parse(block) for block in blocks)
    assert any("transformers" in block for block in blocks) or objective == "pairwise"
    if objective in ("bradley_terry", "pointwise"):
        assert '"use_activation": false' in text and "no sigmoid, no softmax" in text
    assert ("Between prompts they are not" in text) == (objective == "bradley_terry")


def test_a_model_that_fails_its_gate_says_so_first():
    judged = gate.judge({"accuracy": 0.9, "gap": 0.1}, evaluation(), [])
    text = made(quality=judged)
    assert text.index("**Not good enough: fails 1 of 2 checks of the quality gate**") < text.index("## How to use it")
    assert "| failed | Validation accuracy | Validation accuracy 86.0%" in text and "What to do" not in text
    passed = made(quality=gate.judge({"accuracy": 0.5, "gap": 0.1}, evaluation(), []))
    assert "**Good enough: passes all 2 checks of the quality gate**" in passed


def test_names_from_data_are_no_markup():
    of = evaluation()
    of["sets"]["<script>x|y\n# z"] = of["sets"].pop("validation")
    of["sets"]["<script>x|y\n# z"]["failing"][0]["name"] = "[a](b)\n- c"
    text = made(evaluation=of)
    assert "<script>" not in text.split("\n---\n", 1)[1] and "\n# z" not in text.split("\n---\n", 1)[1]
    assert "\n- c" not in text and "\\[a](b) - c (length difference)" in text
    assert ModelCard(text).data.eval_results[0].dataset_name == "<script>x|y\n# z"


@pytest.mark.parametrize(("family", "named"), [("qwen3", False), ("gemma3_text", True)])
def test_vllm_is_told_the_class_that_it_would_not_find(family, named):
    name = FAMILIES[family].architecture("SequenceClassification")
    text = made(model={"architectures": [name], "model_type": family})
    assert "vllm serve me/rewards --runner pooling" in text
    told = """ \\\n  --hf-overrides '{"architectures": ["Gemma3ForSequenceClassification"]}'\ncurl"""
    assert (f""""use_activation": false}}'{told}""" in text) == named

"""A few steps of every objective on real rows, from file to export."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from rmjax.config import defaults
from rmjax.inference import reward_model
from rmjax.train import training

pytestmark = pytest.mark.slow

SCORES = {"attributes": ("helpfulness", "correctness", "verbosity"), "scales": (0.0, 4.0)}
# what is tried: objective, its keys, file, other keys of the config
RUNS = {
    "pairs": ("bradley_terry", {}, "llama-factory/dpo_zh_demo.json", {}),
    "votes": ("bradley_terry", {"ties": "davidson"}, "pandalm/testset-v1.json", {"data.max_bad_fraction": 0.1}),
    "trees": ("bradley_terry", {"rankings": "plackett_luce"}, "open-assistant/en_100_tree.jsonl", {}),
    "comparisons": (
        "bradley_terry",
        {"rankings": "plackett_luce", "ties": "efron"},
        "finegrained-rlhf/dev_feedback.json.gz",
        {"data.sample": "40"},
    ),
    "booleans": ("pointwise", {"attributes": ("label",), "scales": (0.0, 1.0)}, "llama-factory/kto_en_demo.json", {}),
    "attributes": ("pointwise", SCORES, "nemo-aligner/test-rm.jsonl", {"data.validation_fraction": 0.3}),
    "judge": ("pairwise", {}, "pandalm/testset-v1.json", {"data.max_bad_fraction": 0.1}),
    "feedback": ("sft", {"turns": "last"}, "prometheus/vicuna_eval.json.gz", {"data.format": "prometheus_judge"}),
    "verdicts": ("sft", {"target": "pair"}, "pandalm/testset-v1.json", {"data.max_bad_fraction": 0.1}),
}


def config_of(objective, keys, data, more, tmp_path):
    config = defaults(objective)
    config.objective.update(keys)
    config.duration = config.eval.every = "4 steps"
    config.model.scratch = ConfigDict(
        {
            **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16384},
        }
    )
    config.data.train, config.data.workers = str(data), 0
    config.data.cache_dir = str(tmp_path / "cache")
    config.plan.row_tokens, config.plan.rows_per_step = 4096, 1
    config.data.over_long = "truncate_response"
    config.log.tensorboard, config.log.every, config.eval.train_groups = False, "1 steps", 0
    config.optim.learning_rate, config.optim.warmup = 1e-3, "0 steps"
    config.update_from_flattened_dict(more)
    return config


@pytest.mark.parametrize("name", RUNS)
def test_a_few_steps_on_real_rows(name, shared_data, tmp_path):
    objective, keys, file, more = RUNS[name]
    config = config_of(objective, keys, shared_data / file, more, tmp_path)
    config.model.tokenizer = str(shared_data / "tokenizers" / "minimind")
    training.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 4 and np.isfinite(losses).all()
    before, after = (line["validation/loss"] for line in lines if "validation/loss" in line)
    assert np.isfinite([before, after]).all() and after != before
    assert reward_model.load_checked(tmp_path / "run" / "export").objective is not None

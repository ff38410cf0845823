"""A few steps of every objective on rows in the shape of public ones, from file to export."""

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
    "pairs": ("bradley_terry", {}, "chinese_pairs.json", {}),
    "votes": ("bradley_terry", {"ties": "davidson"}, "votes.json", {"data.max_bad_fraction": 0.1}),
    "trees": ("bradley_terry", {"rankings": "plackett_luce"}, "trees.jsonl", {}),
    "comparisons": (
        "bradley_terry",
        {"rankings": "plackett_luce", "ties": "efron"},
        "comparisons.json.gz",
        {"data.sample": "16"},
    ),
    "booleans": ("pointwise", {"attributes": ("label",), "scales": (0.0, 1.0)}, "booleans.json", {}),
    "attributes": ("pointwise", SCORES, "attributes.jsonl", {}),
    "judge": ("pairwise", {}, "votes.json", {"data.max_bad_fraction": 0.1}),
    "feedback": ("sft", {"turns": "last"}, "judges.json.gz", {"data.format": "prometheus_judge"}),
    "verdicts": ("sft", {"target": "pair"}, "votes.json", {"data.max_bad_fraction": 0.1}),
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
    config.plan.row_tokens, config.plan.rows_per_step = 1024, 1
    config.data.validation_fraction = 0.2
    config.data.over_long = "truncate_response"
    config.log.to, config.log.every, config.eval.train_groups = "", "1 steps", 0
    config.optim.learning_rate, config.optim.warmup = 1e-3, "0 steps"
    config.update_from_flattened_dict(more)
    return config


IN_CI = ("feedback", "comparisons", "verdicts")  # scores, tables of wins, a judge


@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.release) for name in RUNS]
)
def test_a_few_steps(name, small_sets, tokenizer_dir, tmp_path):
    objective, keys, file, more = RUNS[name]
    config = config_of(objective, keys, small_sets / file, more, tmp_path)
    config.model.tokenizer = str(tokenizer_dir)
    training.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 4 and np.isfinite(losses).all()
    before, after = (line["validation/loss"] for line in lines if "validation/loss" in line)
    assert np.isfinite([before, after]).all() and after != before
    assert reward_model.load_checked(tmp_path / "run" / "export").objective is not None

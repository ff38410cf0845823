"""The demo of judges that write: what its data gives away, and whole runs of the command."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers

from rmjax.data import synthetic
from rmjax.data.synthetic.ratings import BAD, GOOD, SUBJECTS
from rmjax.judging.verdicts import parse_verdict
from rmjax.train import training

ROOT = Path(__file__).parents[2]
CONFIG = "configs/sft_tiny.py"


def follows(row):
    """Whether the reply is about the topic of the prompt."""
    (named,) = (word for word in SUBJECTS if word in row["prompt"].lower())
    return named in row["response"].lower()


def test_the_planted_rule_and_its_noise():
    rows = list(synthetic.rows("ratings", n=800))
    right = np.mean([row["score"] == (GOOD if follows(row) else BAD) for row in rows])
    assert right == 0.95 and np.mean([row["score"] == GOOD for row in rows]) == 0.5
    assert rows[:50] == list(synthetic.rows("ratings", n=50)) != list(synthetic.rows("ratings", n=50, seed=1))
    assert all(sum(word in row["response"].lower() for word in SUBJECTS) == 1 for row in rows)


def test_neither_length_nor_words_tell_the_rating():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    train_rows, test_rows = (list(synthetic.rows("ratings", n=3000, seed=seed)) for seed in (0, 1))
    good = lambda rows: np.array([row["score"] == GOOD for row in rows])
    lengths = [len(row["response"]) for row in test_rows]
    assert abs(roc_auc_score(good(test_rows), lengths) - 0.5) < 0.04
    for read in (lambda r: r["prompt"], lambda r: r["response"], lambda r: r["prompt"] + " " + r["response"]):
        words = CountVectorizer().fit([read(row) for row in train_rows])
        model = LogisticRegression(max_iter=1000).fit(words.transform(map(read, train_rows)), good(train_rows))
        assert abs(model.score(words.transform(map(read, test_rows)), good(test_rows)) - 0.5) < 0.04


def column(workdir, name):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line.get(name) is not None]


def written(export, rows):
    """What transformers writes after the demo's question about these rows, greedily."""
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    texts = []
    for row in rows:
        question = {"role": "user", "content": f"{row['prompt']}\n{row['response']}"}
        ids = tokenizer.apply_chat_template(
            [question], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def launch(workdir, *flags, devices=1):
    """Runs the command on CPU devices, fails with what it printed."""
    run = [sys.executable, "-m", "rmjax.main", f"--config={CONFIG}", f"--workdir={workdir}", *flags]
    env = dict(os.environ, JAX_PLATFORMS="cpu", XDG_CACHE_HOME=str(workdir.parent / "cache"))
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
def test_the_judge_from_start_to_what_it_writes(tmp_path):
    launch(tmp_path)
    accuracy = column(tmp_path, "validation/verdict_accuracy")
    assert accuracy[0] < 0.1 and max(accuracy) > 0.85
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and "id2label" not in config
    rows = list(synthetic.rows("ratings", n=60, seed=2))
    verdicts = [parse_verdict(text, "score", scale=(BAD, GOOD)) for text in written(tmp_path / "export", rows)]
    assert sum(verdict.kind == "unparseable" for verdict in verdicts) <= 1
    rule = [verdict.value == (GOOD if follows(row) else BAD) for verdict, row in zip(verdicts, rows)]
    assert np.mean(rule) > 0.85


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(tmp_path):
    flat = {"duration": "3 steps", "log.every": "1 steps", "optim.learning_rate": 1e-4, "plan.rows_per_step": 8}
    flat |= {"data.train": "synthetic://ratings?n=300", "data.validation": "synthetic://ratings?n=40&seed=1"}
    flags = [f"--config.{key}={value}" for key, value in flat.items()]
    flags += ["--config.model.scratch.tie_word_embeddings=False", "--config.log.to="]
    launch(tmp_path / "one", *flags)
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    launch(tmp_path / "mixed", *flags, *mesh, devices=8)
    one, mixed = (column(tmp_path / name, "train/loss") for name in ("one", "mixed"))
    assert len(one) == 3 and np.abs(np.subtract(one, mixed)).max() <= 1e-5


@pytest.mark.release
@pytest.mark.parametrize(("seed", "tied"), [(2, False)])
def test_the_judge_with_other_seeds(seed, tied, tmp_path):
    config = runpy.run_path(str(ROOT / CONFIG))["get_config"]()
    config.seed, config.data.cache_dir, config.log.to = seed, str(tmp_path / "cache"), ""
    config.model.scratch.tie_word_embeddings = tied
    training.run(config, tmp_path / "run")
    accuracy = column(tmp_path / "run", "validation/verdict_accuracy")
    assert accuracy[0] < 0.1 and max(accuracy) > 0.85
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")

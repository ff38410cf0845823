"""docs/from_trl.md's worked example: the same data file and settings give the first losses that TRL logs.

TRL's side is its formula in torch on transformers' model; with TRL itself in `python -m pytest -m release`.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import small_runs
import tiny_models
import torch
import transformers
from own_environment import ENV, python_with

from rmjax.data.synthetic import FILLER

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "from_trl.md").read_text()
ADAM = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}  # what the page says of both sides


@pytest.fixture(scope="module")
def given(tmp_path_factory, tokenizer_dir):
    """A model directory and a file of eight pairs."""
    directory = tmp_path_factory.mktemp("given")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.2}
    tiny_models.make_hf_model("qwen2", directory / "model", **sizes)
    tokenizer.save_pretrained(directory / "model")
    said = lambda role, text: [{"role": role, "content": text}]
    draw = lambda rng: " ".join(rng.choice(FILLER, rng.integers(2, 12)))
    rows = []
    for number in range(8):
        rng = np.random.default_rng(number)
        rows.append({"prompt": said("user", draw(rng))})
        rows[-1] |= {side: said("assistant", draw(rng)) for side in ("chosen", "rejected")}
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory, rows


@pytest.fixture(scope="module")
def ours(given, tmp_path_factory):
    """The losses of the command on the page."""
    directory, _ = given
    command = re.search(r"```bash\n(python -m rmjax\.main.*?)```", PAGE, re.S)[1].replace("\\\n", " ")
    config, _, *flags = shlex.split(command)[3:]
    values = dict(flag.removeprefix("--config.").split("=", 1) for flag in flags)
    files = {"MODEL": directory / "model", "pairs.jsonl": directory / "pairs.jsonl"}
    values = {key: str(files.get(value, value)) for key, value in values.items()}
    run = tmp_path_factory.mktemp("ours") / "run"
    fast = {"log.to": "", "log.report": False, "plan.row_tokens": 1024, "data.workers": 0}
    small_runs.Started(
        run, run.parent / "cache", config=config.removeprefix("--config="), small=fast, **values
    ).finish()
    return small_runs.column(run, "train/loss")


def test_the_first_losses_are_those_of_the_formula(given, ours):
    directory, rows = given
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory / "model", dtype=torch.float32)
    ids = lambda row, side: tokenizer.apply_chat_template(
        row["prompt"] + row[side], return_tensors="pt", return_dict=True
    )
    adam, losses = torch.optim.AdamW(model.parameters(), **ADAM), []
    for _ in range(3):
        rewards = [[model(**ids(row, side)).logits[0, 0] for side in ("chosen", "rejected")] for row in rows]
        loss = -torch.stack([torch.nn.functional.logsigmoid(a - b) for a, b in rewards]).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        losses.append(loss.item())
    assert len(set(np.round(losses, 3))) == 3  # it moves
    np.testing.assert_allclose(ours, losses, atol=1e-4)


TRL = """
import json, sys, datasets, trl
args = trl.RewardConfig(
    output_dir=sys.argv[3], learning_rate=1e-4, lr_scheduler_type="constant", per_device_train_batch_size=8,
    num_train_epochs=3, bf16=False, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no",
)
rows = datasets.load_dataset("json", data_files=sys.argv[2], split="train")
trainer = trl.RewardTrainer(model=sys.argv[1], args=args, train_dataset=rows)
trainer.train()
print(json.dumps([line["loss"] for line in trainer.state.log_history if "loss" in line]))
"""


@pytest.mark.release
def test_they_are_those_of_trl_itself(given, ours, tmp_path):
    directory, _ = given
    python = python_with(tmp_path / "venv", "torch==2.13.0", "trl==1.16.*")
    command = [python, "-c", TRL, directory / "model", directory / "pairs.jsonl", tmp_path / "trl"]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=ENV)
    assert done.returncode == 0
    np.testing.assert_allclose(ours, json.loads(done.stdout.splitlines()[-1]), atol=1e-4)

"""TRL's side of trl_start.py, run by TRL's Python: prepares a data set, makes a model, or trains it.

    python benchmarks/trl_start_side.py TASK.json

What a task holds is in trl_start.py. Nothing here needs rmjax.
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

CONFIG = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def tokenize(task: dict[str, Any]) -> dict[str, Any]:
    """The RewardTrainer's preparation of a data set, with a process for each core."""
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(task["tokenizer"])
    config = trl.RewardConfig(output_dir="unused", max_length=None, dataset_num_proc=task["cores"], **CONFIG)
    begin = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=task["pairs"], split="train")
    rows = trl.RewardTrainer._prepare_dataset(None, rows, tokenizer, config, "train")  # it reads nothing of the trainer
    end = time.perf_counter()
    some = rows.select(range(0, len(rows), task["checked"]))
    ids = [[row["chosen_ids"], row["rejected_ids"]] for row in some]
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return {"work_s": end - begin, "pairs": len(rows), "ids": digest, "after_s": time.perf_counter() - end}


def make(task: dict[str, Any]) -> dict[str, Any]:
    """Saves a Qwen2 reward model with random weights for the tokenizer's vocabulary."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(task["tokenizer"])
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True, "num_labels": 1}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.Qwen2Config(vocab_size=len(tokenizer), **shape, **more, **ids)
    transformers.Qwen2ForSequenceClassification(config).float().save_pretrained(task["model"])
    return {}


def start(task: dict[str, Any]) -> dict[str, Any]:
    """Trains as a script of TRL does; says when the first step is done, and returns its loss."""
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(task["cores"])
    losses: list[float] = []

    class Watched(trl.RewardTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss))
            return loss

    class Said(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            print("step 1 done", flush=True)

    optim = task["optim"]
    config = trl.RewardConfig(
        output_dir=task["scratch"],
        per_device_train_batch_size=4,  # faster on a CPU than one batch of 32, see trl_cpu.py
        gradient_accumulation_steps=task["per_step"] // 4,
        max_steps=task["steps"],
        max_length=None,
        gradient_checkpointing=False,
        learning_rate=optim["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=optim["b1"],
        adam_beta2=optim["b2"],
        adam_epsilon=optim["eps"],
        weight_decay=optim["weight_decay"],
        max_grad_norm=optim["clip_norm"],
        optim="adamw_torch_fused",
        **CONFIG,
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(task["model"], dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(task["tokenizer"])
    rows = datasets.load_dataset("json", data_files=task["pairs"], split="train")
    trainer = Watched(model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[Said()])
    trainer.train()
    return {"loss": sum(losses) / len(losses)}


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({"tokenize": tokenize, "make": make, "start": start}[given["do"]](given)))

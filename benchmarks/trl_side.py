"""The peers' side of trl_cpu.py and scoring.py, run by their Python: makes the model, trains it with TRL's own
RewardTrainer (a judge with transformers' Trainer), or scores with transformers.

    python benchmarks/trl_side.py JOB.json

Prints one line of JSON; what a job holds is in those files. Nothing here needs rmjax.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

START = time.perf_counter()

import torch  # noqa: E402  the time of these imports is measured
import transformers  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"


def make(job: dict[str, Any]) -> dict[str, Any]:
    """Saves a Qwen2 reward model with random weights, and a tokenizer that holds no more than TRL asks for."""
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = transformers.Qwen2Config(**job["shape"])
    model = transformers.Qwen2ForSequenceClassification(config).float()
    model.save_pretrained(job["model"])
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(job["model"])
    return {"parameters": sum(p.numel() for p in model.parameters())}


class Padded(transformers.DataCollatorWithPadding):
    """Pads rows, and leaves out what only the sampler reads."""

    def __call__(self, features: Any) -> Any:
        return super().__call__([{k: v for k, v in row.items() if k != "length"} for row in features])


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Trains on the first pairs in their order, or on all grouped by length; times every optimizer step.

    Returns:
        start_s, seconds until the first step begins; and for each step its seconds, pairs, tokens (padding too) and
        loss.
    """
    import trl
    from datasets import Dataset

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    clock: list[float] = []
    seen: list[dict[str, float]] = []  # of each micro-batch

    judging = job["objective"] == "pairwise"

    class Watched(transformers.Trainer if judging else trl.RewardTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            ids = inputs["input_ids"]
            if judging:  # a mean over the rows of a micro-batch, as RewardTrainer's is over its pairs
                self.model_accepts_loss_kwargs = False
                labels = inputs.pop("labels")
                loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
            else:
                loss = super().compute_loss(model, inputs, *args, **kwargs)
            seen.append({"pairs": len(ids) // 2, "tokens": ids.numel(), "loss": loss.item()})
            return loss

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

    pairs = json.loads(Path(job["pairs"]).read_text())[: job["first"] * job["pairs_of_group"] or None]
    rows = [{"chosen_ids": p + c, "rejected_ids": p + r, "length": len(p) + max(len(c), len(r))} for p, c, r in pairs]
    if judging:
        orders = [(p + a + b, label) for p, c, r in pairs for a, b, label in ((c, r, 0), (r, c, 1))]
        rows = [{"input_ids": ids, "labels": label, "length": len(ids)} for ids, label in orders]
    options, optim = job["trl"], job["optim"]
    pieces = job["groups_per_step"] * job["pairs_of_group"] // options["micro"]
    config = trl.RewardConfig(
        output_dir=job["scratch"],
        per_device_train_batch_size=options["micro"] * (2 if judging else 1),
        gradient_accumulation_steps=pieces,
        num_train_epochs=job["epochs"],
        max_steps=job["steps"] or -1,
        train_sampling_strategy="sequential" if job["first"] else "group_by_length",
        remove_unused_columns=False,  # the sampler reads `length`
        dataloader_drop_last=True,
        dataloader_num_workers=0,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        optim=options["optimizer"],
        learning_rate=optim["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=optim["b1"],
        adam_beta2=optim["b2"],
        adam_epsilon=optim["eps"],
        weight_decay=optim["weight_decay"],
        max_grad_norm=optim["clip_norm"],
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        torch_compile=options["compile"],
        seed=job["seed"],
    )
    attention = {"attn_implementation": options["attention"], "dtype": torch.float32}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(job["model"], **attention)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    padded = {"data_collator": Padded(tokenizer, return_tensors="pt")} if judging else {}
    data = Dataset.from_list(rows)
    trainer = Watched(model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()], **padded)
    trainer.train()
    steps = [seen[i : i + pieces] for i in range(0, len(seen), pieces)]
    return {
        "start_s": clock[0] - START,
        "seconds": [b - a for a, b in itertools.pairwise(clock)],
        "pairs": [sum(x["pairs"] for x in step) for step in steps],
        "tokens": [sum(x["tokens"] for x in step) for step in steps],
        "losses": [sum(x["loss"] for x in step) / len(step) for step in steps],
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Scores all conversations, sorted by length, in padded batches; twice, of which the second pass is timed."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kinds = {"attn_implementation": "sdpa", "dtype": torch.float32}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(job["model"], **kinds).eval()
    whole = [prompt + response for prompt, responses in job["conversations"] for response in responses]
    order = sorted(range(len(whole)), key=lambda i: len(whole[i]))
    batches = [order[i : i + job["batch"]] for i in range(0, len(order), job["batch"])]
    scores = [0.0] * len(whole)
    with torch.inference_mode():
        for _ in range(2):
            begin = time.perf_counter()
            for batch in batches:
                longest = len(whole[batch[-1]])
                ids = torch.full((len(batch), longest), model.config.pad_token_id)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(batch):
                    ids[row, : len(whole[i])], mask[row, : len(whole[i])] = torch.tensor(whole[i]), 1
                for i, value in zip(batch, model(ids, attention_mask=mask).logits[:, 0].tolist()):
                    scores[i] = value
            seconds = time.perf_counter() - begin
    return {"seconds": seconds, "scores": scores}


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    given = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({"make": make, "train": train, "score": score}[given["do"]](given)))

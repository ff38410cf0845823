"""The update of reinforcement learning: samples of a question as one tree, against a row for each; seconds of both.

    python benchmarks/updates.py --questions=8 --samples=8 --prompt=512 --answer=256

A model of 4 layers of width 256 in float32, random tokens, answers that share nothing but their prompt; the loss and
its gradient, after a first call that compiles. No sampling is in it. The two take turns.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.batches import actions, loader, packing
from rmjax.batches.actions import Sample
from rmjax.batches.loader import Shape
from rmjax.models import heads
from rmjax.models.config import from_hf
from rmjax.objectives.grpo import GRPO
from rmjax.train.step import accumulate

MODEL = {"model_type": "qwen2", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024}
MODEL |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}


class Listed:
    """Groups in a list."""

    def __init__(self, groups):
        self.group = groups.__getitem__


def batch_of(objective, groups, row_tokens):
    """Micro-batches of one row each."""
    rows = packing.pack(np.array([len(group.tree) for group in groups]), row_tokens)
    fields = tuple(objective.fields.items())
    ends = max(sum(len(groups[i].tree.end) for i in row) for row in rows)
    shape = Shape(len(rows), 1, row_tokens, max(map(len, rows)), ends, 64, fields)
    return loader.fill(rows, Listed(groups), shape, range(1)), len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("questions", 8), ("samples", 8), ("prompt", 512), ("answer", 256), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    rng, objective, config = np.random.default_rng(0), GRPO(target="score"), from_hf(MODEL)
    graph, _ = heads.abstract(config, 0, architecture="CausalLM")
    params = heads.init(config, 0, jnp.float32, architecture="CausalLM")
    questions = []
    for _ in range(args.questions):
        prompt = rng.integers(1, 4096, args.prompt).astype(np.int32)
        answers = rng.integers(1, 4096, (args.samples, args.answer)).astype(np.int32)
        answers[:, 0] = np.arange(args.samples)
        old, advantage = np.full(args.answer, -8.0, np.float32), rng.normal(size=args.samples)
        questions.append([Sample(prompt, answer, old, float(a)) for answer, a in zip(answers, advantage)])
    row = args.prompt + args.samples * (args.answer + 1)
    together = [group for samples in questions for group in actions.groups(samples, 1.0, args.samples, row, "")]
    apart = [g for samples in questions for one in samples for g in actions.groups([one], 1.0, 1.0, row, "")]

    def loss(params, micro):
        outputs = heads.merge(graph, params)(micro, remat="q,k,v,attention,mid,gate,up")
        pair = objective.loss_sums(outputs, micro, {})
        return jnp.stack(pair), objective.outcomes(outputs, micro, {})

    step = jax.jit(lambda params, batch: accumulate(loss, params, batch, varies=True))
    sides, results = {"trees": together, "rows": apart}, {}
    batches = {name: batch_of(objective, groups, row) for name, groups in sides.items()}
    gradients = {name: step(params, batch)[0] for name, (batch, _) in batches.items()}
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients["rows"]))
    apart_by = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, gradients.values())))
    seconds = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, (batch, _) in batches.items():
            start = time.perf_counter()
            jax.block_until_ready(step(params, batch))
            seconds[name].append(time.perf_counter() - start)
    for name, (_, rows) in batches.items():
        tokens = sum(len(group.tree) for group in sides[name])
        results[name] = {"seconds": round(statistics.median(seconds[name]), 3), "tokens": tokens, "rows": rows}
    ratios = [a / b for a, b in zip(seconds["rows"], seconds["trees"])]
    results["times as fast"] = [round(x, 2) for x in (statistics.median(ratios), min(ratios), max(ratios))]
    results["gradients differ by"] = f"{apart_by / scale:.1e} of the largest"
    print(json.dumps(results))


if __name__ == "__main__":
    main()

r"""A step of GRPO: TRL's GRPOTrainer without vLLM against rmjax on a CPU, the same model and prompts.

    python -m venv trl && trl/bin/pip install 'torch==2.13.0' 'trl==1.16.*'
    python benchmarks/trl_grpo.py --trl-python=trl/bin/python

A Qwen2 of 4 layers of width 256 with random weights in float32, made by transformers. A step draws --samples answers
of --answer tokens to each of --questions prompts of --prompt tokens at temperature 1, rewards them by chance, and takes
one AdamW step. Answers have the same length on both sides: TRL is told not to end them, and we have no token that ends
one. A rate is the answers of a step over its time; the first two steps, which compile and warm up, do not count.
Neither side recomputes activations, has a reference model, or saves anything. Each side runs in its own process, one
at a time.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP = 2  # steps
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the model where it is not yet, and trains it with TRL."""
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    if not (Path(args.model) / "config.json").exists():
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)).float().save_pretrained(args.model)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 4096)}}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    clock: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        assert all(len(ids) == args.answer for ids in completion_ids)
        return [float(sum(ids) % 7) for ids in completion_ids]

    step = args.questions * args.samples
    config = trl.GRPOConfig(
        output_dir=args.scratch,
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=step // args.micro,
        num_generations=args.samples,
        max_completion_length=args.answer,
        generation_kwargs={"min_new_tokens": args.answer},
        max_steps=args.steps + WARM_UP,
        beta=0.0,
        learning_rate=1e-6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in prompts(args)]
    model = transformers.Qwen2ForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    data = Dataset.from_list(rows)
    trainer = trl.GRPOTrainer(model, reward, config, data, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    return {"seconds": seconds(clock), "trl": trl.__version__, "torch": torch.__version__}


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Draws with rmjax's sampler, lays trees, and takes the step."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from updates import batch_of

    from rmjax import sharding
    from rmjax.batches import actions
    from rmjax.batches.actions import Sample
    from rmjax.inference.sampler import Drawing, Prompt, Sampler
    from rmjax.models import heads, hf
    from rmjax.models.config import from_hf
    from rmjax.objectives.grpo import GRPO, advantages
    from rmjax.train.step import accumulate

    config = from_hf(hf.read_config(args.model))
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    graph, shapes = heads.abstract(config, 0, architecture="CausalLM")
    shapes = sharding.with_shardings(shapes, sharding.param_shardings(mesh, shapes))
    params, _ = hf.load(args.model, shapes, config, seed=0)
    objective, optimizer = GRPO(target="score"), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    drawing = Drawing(responses=args.samples, max_tokens=args.answer)
    sampler = Sampler(config, None, mesh, "float32", drawing, stops=(), groups=args.questions)
    row = args.prompt + args.samples * (args.answer + 1)

    def loss(params: Any, micro: Any) -> Any:
        outputs = heads.merge(graph, params)(micro, remat="none")
        return jnp.stack(objective.loss_sums(outputs, micro, {})), objective.outcomes(outputs, micro, {})

    @jax.jit
    def update(params: Any, state: Any, batch: Any) -> Any:
        gradients = accumulate(loss, params, batch, varies=True)[0]
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state

    state, clock = optimizer.init(params), []
    asked = prompts(args)
    for number in range(args.steps + WARM_UP):
        some = asked[number * args.questions : (number + 1) * args.questions]
        sampler.load(params)
        said = dict(sampler.responses([Prompt(ids, number * 100 + i) for i, ids in enumerate(some)]))
        groups = []
        for i, ids in enumerate(some):
            assert all(len(one.tokens) == args.answer for one in said[i])
            worth = advantages(np.array([float(one.tokens.sum() % 7) for one in said[i]]), objective.baseline)
            samples = [Sample(np.array(ids), x.tokens, x.log_probs, float(a)) for x, a in zip(said[i], worth)]
            groups += actions.groups(samples, 1.0, args.samples, row, "")
        params, state = jax.block_until_ready(update(params, state, batch_of(objective, groups, row)[0]))
        clock.append(time.perf_counter())
    return {"seconds": seconds(clock), "jax": jax.__version__}


def seconds(ends: list[float]) -> list[float]:
    """Of the steps that count, from the times at which all steps ended."""
    return [b - a for a, b in itertools.pairwise(ends)][WARM_UP - 1 :]


def prompts(args: argparse.Namespace) -> list[list[int]]:
    """Of all steps, the same on both sides."""
    import numpy as np

    number = args.questions * (args.steps + WARM_UP)
    return np.random.default_rng(0).integers(2, 4096, (number, args.prompt)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="Python of an environment with TRL")
    for name, default in (("questions", 8), ("samples", 8), ("prompt", 512), ("answer", 64), ("micro", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=3, help="that count, in a round")
    parser.add_argument("--rounds", type=int, default=2)
    for name in ("side", "model", "scratch"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(theirs(args) if args.side == "trl" else ours(args)))
        return
    found: dict[str, list[float]] = {"trl": [], "rmjax": []}
    with tempfile.TemporaryDirectory() as scratch:
        more = ["--side={}", f"--model={scratch}/model", f"--scratch={scratch}/trl"]
        for _ in range(args.rounds):
            for side, python in (("trl", args.trl_python), ("rmjax", sys.executable)):
                command = [python, __file__, *sys.argv[1:], *(x.format(side) for x in more)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                result = json.loads(done.stdout.splitlines()[-1])
                found[side] += result.pop("seconds")
                print(side, result, [round(x, 2) for x in found[side]], file=sys.stderr)
    step = args.questions * args.samples
    rates = {side: round(step / statistics.median(seconds), 2) for side, seconds in found.items()}
    times = round(statistics.median(found["trl"]) / statistics.median(found["rmjax"]), 2)
    print(json.dumps({"answers a second": rates, "times as fast": times}))


if __name__ == "__main__":
    main()

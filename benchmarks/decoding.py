"""Sampling on the accelerator that is here: tokens a second, how near a step comes to the memory's limit, and vLLM.

    python benchmarks/decoding.py --bandwidth=4800 --output=runs/decoding.json       (GB/s of one H200)
    python benchmarks/decoding.py --vllm-python=/opt/vllm/bin/python ...             and vLLM on the same weights
    python benchmarks/decoding.py --models=tiny --work=40x8x4 --slots=16 --bandwidth=10      to see that it works

The weights are random, bfloat16, and the same for both; vLLM 0.33 has an environment and a process of its own, in which
prompts are token ids. Nothing stops before its last token. `--work` is PROMPTxTOKENSxRESPONSES: tokens of a prompt, of
a response, and responses to a prompt. The first round of each is not counted. A step is timed apart, with prompts of
two tokens: it reads every weight, and the keys and values that the slots wrote. Its share of the limit is the time that
--bandwidth needs for these bytes over the time that it took.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmjax import sharding
from rmjax.inference.sampler import Drawing, Prompt, Sampler
from rmjax.models import heads, hf
from rmjax.models.config import ModelConfig, from_hf

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHARED = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "tie_word_embeddings": True}
MODELS = {
    "tiny": {"model_type": "qwen2", "vocab_size": 512, **dict(zip(SIZES, (64, 256, 2, 4, 2)))},
    "qwen2.5-0.5b": {"model_type": "qwen2", "vocab_size": 151936, **dict(zip(SIZES, (896, 4864, 24, 14, 2)))},
    "qwen3-4b": {"model_type": "qwen3", "vocab_size": 151936, **dict(zip(SIZES, (2560, 9728, 36, 32, 8)))}
    | {"head_dim": 128},
}
VLLM = """
import json, sys, time
import vllm
asked = json.load(open(sys.argv[1]))
model = vllm.LLM(asked["model"], skip_tokenizer_init=True, dtype="bfloat16", max_num_seqs=asked["slots"],
                 enable_prefix_caching=True)
how = vllm.SamplingParams(n=asked["responses"], temperature=1.0, max_tokens=asked["tokens"], ignore_eos=True,
                          detokenize=False)
prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
seconds = []
for _ in range(asked["rounds"] + 1):
    begin = time.perf_counter()
    found = model.generate(prompts, how, use_tqdm=False)
    seconds.append(time.perf_counter() - begin)
    assert all(len(one.token_ids) == asked["tokens"] for of_one in found for one in of_one.outputs)
json.dump({"seconds": seconds[1:], "version": vllm.__version__}, open(sys.argv[2], "w"))
"""


def make(name: str, directory: Path | None) -> tuple[ModelConfig, Any, jax.sharding.Mesh]:
    """A model of random weights on the devices, and, for vLLM, in a Hugging Face directory."""
    values = {**SHARED, **MODELS[name], "torch_dtype": "bfloat16"}
    config = from_hf(values)
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
    _, shapes = heads.abstract(config, 0, "bfloat16", "bfloat16", architecture="CausalLM")
    places = sharding.param_shardings(mesh, shapes)
    new = jax.jit(lambda: heads.init(config, 0, "bfloat16", architecture="CausalLM"), out_shardings=places)
    params = new()
    if directory is not None:
        how = {"dtype": "bfloat16", "pad_token_id": 0, "architecture": "CausalLM"}
        hf.save(directory, params, values, config, **how)
    return config, params, mesh


def ours(
    config: ModelConfig, params: Any, mesh: jax.sharding.Mesh, asked: dict[str, Any], bandwidth: float
) -> dict[str, Any]:
    drawing = Drawing(responses=asked["responses"], max_tokens=asked["tokens"])
    groups = max(1, asked["slots"] // asked["responses"])
    sampler = Sampler(config, params, mesh, "bfloat16", drawing, stops=(), groups=groups)
    prompts = [Prompt(ids, row) for row, ids in enumerate(asked["prompts"])]
    seconds = []
    for _ in range(asked["rounds"] + 1):
        begin = time.perf_counter()
        done = dict(sampler.responses(prompts))
        seconds.append(time.perf_counter() - begin)
        assert all(len(one.tokens) == asked["tokens"] for of_one in done.values() for one in of_one)
    # Prompts of two tokens are read in no time: what is left are the steps.
    short = [Prompt(prompt.tokens[:2], prompt.row) for prompt in prompts[:groups]]
    dict(sampler.responses(short))
    begin = time.perf_counter()
    dict(sampler.responses(short))
    step = (time.perf_counter() - begin) / asked["tokens"]
    key = 2 * config.layers * config.kv_heads * config.head_dim * 2  # bytes of a token's keys and values
    weights = sum(x.size * 2 for x in jax.tree.leaves(params))
    read = weights + len(short) * asked["responses"] * key * asked["tokens"] / 2
    return {"seconds": seconds[1:], "step": step, "share": read / (bandwidth * 1e9) / step}


def vllm(python: str, asked: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "asked.json", Path(scratch) / "found.json"
        given.write_text(json.dumps(asked))
        done = subprocess.run([python, "-c", VLLM, str(given), str(found)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"vLLM ended with {done.returncode}: {done.stderr[-2000:]}")
        return json.loads(found.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="qwen2.5-0.5b,qwen3-4b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--work", default="100x300x1,1500x400x8", help="tokens of a prompt x of a response x responses")
    parser.add_argument("--slots", type=int, default=512, help="responses that are written at a time")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bandwidth", type=float, required=True, help="GB/s of the devices' memory, all together")
    parser.add_argument("--vllm-python", default="", help="Python of an environment with vLLM; without it only rmjax")
    parser.add_argument("--output", "--json", default="", help="JSON file")
    args = parser.parse_args()
    rng, rows = np.random.default_rng(0), []
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "model"
            config, params, mesh = make(name, directory if args.vllm_python else None)
            for work in args.work.split(","):
                prompt, tokens, responses = map(int, work.split("x"))
                count = 2 * args.slots // responses  # every group twice
                ids = rng.integers(1, config.vocab, (count, prompt)).tolist()
                asked: dict[str, Any] = {"model": str(directory), "prompts": ids, "slots": args.slots}
                asked |= {"responses": responses, "tokens": tokens, "rounds": args.rounds}
                made = count * responses * tokens
                row = {"model": name, "work": work, **ours(config, params, mesh, asked, args.bandwidth)}
                row["tokens_per_s"] = made / min(row["seconds"])
                said = f"{name} {work}: {row['tokens_per_s']:,.0f} tokens/s, a step {1e3 * row['step']:.1f} ms"
                said += f", {row['share']:.0%} of the memory's limit"
                if args.vllm_python:
                    row["vllm"] = vllm(args.vllm_python, asked)
                    said += f"; vLLM {made / min(row['vllm']['seconds']):,.0f} tokens/s"
                rows.append(row)
                print(said, flush=True)
                if args.output:  # after each, so that one that is stopped leaves those before
                    found = {"device": jax.devices()[0].device_kind, "rows": rows}
                    Path(args.output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

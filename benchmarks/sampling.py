"""Tokens a second of the sampler beside transformers' `generate` with a KV cache, on the same random weights.

    python benchmarks/sampling.py --sizes=tiny,half --output=FILE

Both draw responses of a fixed length at temperature 1, in float32, on the CPU cores that are here; the first round of
each is not counted. Needs torch. In transformers the prompts are padded on the left, and each is repeated for its
responses (`num_return_sequences`).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from rmjax import sharding
from rmjax.inference.sampler import Drawing, Prompt, Sampler
from rmjax.models import heads, hf
from rmjax.models.config import from_hf

SIZES = {  # tiny: as the demos; half: the shapes of Qwen2.5-0.5B, with fewer words
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512},
    "half": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 32_000},
}
HEADS = {"tiny": (4, 2), "half": (14, 2)}


def make(size: str, directory: Path) -> torch.nn.Module:
    heads_of, kv = HEADS[size]
    config = transformers.Qwen2Config(
        **SIZES[size],
        num_attention_heads=heads_of,
        num_key_value_heads=kv,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(directory)
    return model


def ours(directory: Path, prompts: list[list[int]], responses: int, tokens: int, rounds: int) -> list[float]:
    config = from_hf(hf.read_config(directory))
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    _, shapes = heads.abstract(config, 0, architecture="CausalLM")
    shapes = sharding.with_shardings(shapes, sharding.param_shardings(mesh, shapes))
    params, _ = hf.load(directory, shapes, config, seed=0)
    drawing = Drawing(responses=responses, max_tokens=tokens)
    sampler = Sampler(config, params, mesh, "float32", drawing, stops=(), groups=len(prompts))
    del params
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        done = dict(sampler.responses([Prompt(ids, row) for row, ids in enumerate(prompts)]))
        seconds.append(time.perf_counter() - begin)
        assert all(len(one.tokens) == tokens for of_one in done.values() for one in of_one)
    return seconds[1:]


def theirs(model: torch.nn.Module, prompts: list[list[int]], responses: int, tokens: int, rounds: int) -> list[float]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                num_return_sequences=responses,
            )
        seconds.append(time.perf_counter() - begin)
        assert out.shape == (len(prompts) * responses, longest + tokens)
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,half")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt, half of them to all")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a response")
    parser.add_argument("--cases", default="8x1,32x1,8x8", help="prompts x responses")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", default="")
    args = parser.parse_args()
    rng, rows = np.random.default_rng(0), []
    for size in args.sizes.split(","):
        with tempfile.TemporaryDirectory() as directory:
            model = make(size, Path(directory))
            for case in args.cases.split(","):
                count, responses = map(int, case.split("x"))
                vocabulary = SIZES[size]["vocab_size"]
                lengths = rng.integers(args.prompt // 2, args.prompt + 1, count)
                prompts = [rng.integers(1, vocabulary, n).tolist() for n in lengths]
                wanted = (prompts, responses, args.tokens, args.rounds)
                made = count * responses * args.tokens
                rates = [made / min(times) for times in (ours(Path(directory), *wanted), theirs(model, *wanted))]
                row = {"size": size, "prompts": count, "responses": responses}
                rows.append({**row, "ours": rates[0], "theirs": rates[1]})
                shown = f"{rates[0]:,.0f} tokens/s, transformers {rates[1]:,.0f}"
                print(f"{size} {case}: {shown}: {rates[0] / rates[1]:.2f}", flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps({**vars(args), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

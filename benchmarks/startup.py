"""Measures how long a run takes to its first step and how much host memory, the first time and again.

    python benchmarks/startup.py --workdir=runs/startup

Makes a checkpoint of the shape of Qwen2.5-0.5B with random bfloat16 weights (1 GB) and runs `python -m rmjax.main` on
generated pairs until its first step is done: with an empty cache folder, and again in a new workdir with what the first
run left there, tokenized data and compiled programs. Each part of the time ends with a line that the run prints:

    imports and data    from the command to the plan
    compiling, weights  to the compiled step, and to the score head's line, whichever is last; they overlap
    evaluation          of the model as it is, before the first step
    first step

Memory is the process's largest anonymous memory (RssAnon: on a CPU the model's own arrays count, pages of mapped files
do not), while it loads and up to the first step. Before each run the checkpoint's pages leave the page cache.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
}
VOCABULARY = {"0.5B": 151_936, "tiny": 4096}
KV_HEADS = 2
# What a line begins with, and the part of the start that ends there.
ENDS = {
    "plan": r"plan: ",
    "compiled": r"step: ",
    "weights": r"score head: ",
    "evaluation": r"before training: ",
    "first_step": r"step 1[ /]",
}


def make_checkpoint(directory: Path, shape: str) -> None:
    """Writes config.json and random weights, as transformers names them."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    sizes, vocabulary, rng = SHAPES[shape], VOCABULARY[shape], np.random.default_rng(0)
    width, mlp = sizes["hidden_size"], sizes["intermediate_size"]
    kv = KV_HEADS * width // sizes["num_attention_heads"]
    draw = lambda *s: (0.02 * rng.standard_normal(s, np.float32)).astype(ml_dtypes.bfloat16)
    ones = np.ones(width, ml_dtypes.bfloat16)
    tensors = {"model.embed_tokens.weight": draw(vocabulary, width), "model.norm.weight": ones}
    for layer in range(sizes["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        tensors |= {f"{name}.{norm}_layernorm.weight": ones.copy() for norm in ("input", "post_attention")}
        for which, rows in (("q", width), ("k", kv), ("v", kv)):
            tensors[f"{name}.self_attn.{which}_proj.weight"] = draw(rows, width)
            tensors[f"{name}.self_attn.{which}_proj.bias"] = draw(rows)
        tensors[f"{name}.self_attn.o_proj.weight"] = draw(width, width)
        tensors |= {f"{name}.mlp.{which}_proj.weight": draw(mlp, width) for which in ("gate", "up")}
        tensors[f"{name}.mlp.down_proj.weight"] = draw(width, mlp)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    values = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": vocabulary, **sizes}
    values |= {"num_key_value_heads": KV_HEADS, "max_position_embeddings": 32_768, "rope_theta": 1e6}
    values |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(values))


def forget_pages(directory: Path) -> None:
    """Drops the files' pages from the page cache."""
    for path in directory.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Memory(threading.Thread):
    """Watches the anonymous memory of a process, in MiB; the largest since each `mark`."""

    def __init__(self, process: int):
        super().__init__(daemon=True)
        self.process, self.largest, self.marks = process, 0.0, {}

    def run(self) -> None:
        """Reads it until the process is gone."""
        while True:
            try:
                text = Path(f"/proc/{self.process}/status").read_text()
            except OSError:
                return
            if found := re.search(r"RssAnon:\s+(\d+)", text):
                self.largest = max(self.largest, int(found[1]) / 2**10)
            time.sleep(0.01)

    def mark(self, name: str) -> None:
        """Notes the largest so far."""
        self.marks[name] = round(self.largest)


def measure(workdir: Path, checkpoint: Path, run: Path, row_tokens: int) -> dict[str, Any]:
    """Runs the command until its first step is done; when each part ended, in seconds, and the memory until then."""
    shutil.rmtree(run, ignore_errors=True)
    keys = {
        "model.init_from": checkpoint,
        "model.tokenizer": "synthetic",
        "data.train": "synthetic://pairs?n=64&seed=0",
        "data.validation": "synthetic://pairs?n=8&seed=1",
        "eval.train_groups": 0,
        "plan.row_tokens": row_tokens,
        "plan.rows_per_step": 1,
        "plan.groups_per_step": 0,
        "log.tensorboard": False,
    }
    options = [f"--config.{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "-m", "rmjax.main", "--config=configs/bt_qwen0_5b.py", f"--workdir={run}", *options]
    env = {**os.environ, "XDG_CACHE_HOME": str(workdir / "cache"), "PYTHONUNBUFFERED": "1"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    forget_pages(checkpoint)
    start, ends, said = time.perf_counter(), {}, []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, start_new_session=True, **pipes) as process:
        memory = Memory(process.pid)
        memory.start()
        for line in process.stdout or ():
            said.append(line)
            for name, pattern in ENDS.items():
                if name not in ends and re.match(pattern, line):
                    ends[name] = time.perf_counter() - start
                    memory.mark(name)
            if "first_step" in ends:
                os.killpg(process.pid, signal.SIGKILL)  # what follows is not measured
                break
    if missing := [name for name in ENDS if name not in ends]:
        raise ValueError(f"the run ended before it said {', '.join(missing)}:\n" + "".join(said[-30:]))
    return {"seconds": ends, "anonymous_mib": memory.marks}


def line(name: str, values: dict[str, Any]) -> str:
    """A run in a line."""
    at, mib = values["seconds"], values["anonymous_mib"]
    ready = max(at["compiled"], at["weights"])
    return (
        f"{name}: first step done after {at['first_step']:.1f} s: imports and data {at['plan']:.1f}, compiling "
        f"{at['compiled'] - at['plan']:.1f} and weights {at['weights'] - at['plan']:.1f} together "
        f"{ready - at['plan']:.1f}, evaluation {at['evaluation'] - ready:.1f}, first step "
        f"{at['first_step'] - at['evaluation']:.1f}; anonymous memory at most {mib['weights']:,} MiB until the weights "
        f"are there, {mib['first_step']:,} MiB until the first step is done"
    )


def main() -> None:
    """Makes the checkpoint, runs twice, reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="where the checkpoint, the runs and figures go")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="0.5B", help="`tiny` shows that it works")
    parser.add_argument("--row-tokens", type=int, default=512, help="length of the one row of a step")
    given = parser.parse_args()
    workdir = given.workdir.expanduser().absolute()
    checkpoint = workdir / given.shape
    if not (checkpoint / "config.json").is_file():
        make_checkpoint(checkpoint, given.shape)
    shutil.rmtree(workdir / "cache", ignore_errors=True)
    figures = {}
    for name in ("first", "again"):
        try:
            figures[name] = measure(workdir, checkpoint, workdir / name, given.row_tokens)
        except ValueError as error:
            sys.exit(f"error: {error}")
        print(line(name, figures[name]), flush=True)
    (workdir / "startup.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

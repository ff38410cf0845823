"""Replays golden rows through vLLM, in a process of its own: vLLM starts processes and takes memory as it likes.

    python -m rmjax.export.vllm_replay DIRECTORY OUTPUT < job.json

`job.json` has `rows`, a list of lists of token ids, and `overrides` of config.json (vLLM's `hf_overrides`); OUTPUT gets
a list of lists of outputs, in JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rmjax.models import hf
from rmjax.models.families import vllm_overrides

MEMORY = 0.5  # share of a GPU's memory that vLLM may take; nothing else is on it meanwhile
TAIL = 2_000  # characters of what a failed process said


def replay(directory: Path, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Outputs [1, A] of a sequence classifier for each list of token ids, in float32, without any activation.

    Raises:
        RuntimeError: vLLM failed; says how.
    """
    config = hf.read_config(directory)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "outputs.json"
        done = subprocess.run(
            [sys.executable, "-m", "rmjax.export.vllm_replay", str(directory), str(output)],
            input=json.dumps({"rows": [list(map(int, ids)) for ids in rows], "overrides": vllm_overrides(config)}),
            env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ},  # GiB; by default half of the machine's
            capture_output=True,
            text=True,
        )
        if done.returncode or not output.exists():
            said = (done.stderr or done.stdout)[-TAIL:].strip()
            raise RuntimeError(f"vLLM ended with code {done.returncode}: {said}")
        return [np.array(values, np.float64).reshape(1, -1) for values in json.loads(output.read_text())]


def main() -> None:
    """In the process: vLLM's offline pooling, by its documentation of pooling models."""
    import vllm
    from vllm.config import PoolerConfig

    directory, output = sys.argv[1:]
    job = json.load(sys.stdin)
    prompts = [{"prompt_token_ids": ids} for ids in job["rows"]]
    options = {"runner": "pooling", "dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": MEMORY}
    last = PoolerConfig(pooling_type="LAST")  # vLLM's class for any model of transformers pools the first by default
    model = vllm.LLM(model=directory, pooler_config=last, hf_overrides=job["overrides"], **options)
    found = model.encode(prompts, pooling_params=vllm.PoolingParams(use_activation=False), pooling_task="classify")
    values = [np.asarray(one.outputs.data, np.float64).ravel().tolist() for one in found]
    Path(output).write_text(json.dumps(values))


if __name__ == "__main__":
    main()

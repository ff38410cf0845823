"""What benchmarks/servers.py runs in an environment with vLLM: jobs from stdin, answers as lines of a file.

vLLM is imported once, and each job has a process of its own that is forked from there.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine is in the job's own process


def outputs(job: dict[str, Any]) -> list[np.ndarray]:
    """Of each golden row what the contract holds of it."""
    import vllm
    from vllm.config import PoolerConfig
    from vllm.lora.request import LoRARequest

    golden, base = job["golden"], job.get("base")
    values = json.loads((Path(base or job["directory"]) / "config.json").read_text())
    architecture = values["architectures"][0].rpartition("For")[2]
    options = {"model": base or job["directory"], "dtype": job["dtype"], "enforce_eager": True}
    options["hf_overrides"] = job.get("overrides") or {}
    prompts, more = [{"prompt_token_ids": row["token_ids"]} for row in golden], {}
    if base:
        options |= {"enable_lora": True, "max_lora_rank": 8}
        more = {"lora_request": LoRARequest("adapter", 1, job["directory"])}
    if architecture == "CausalLM":
        model = vllm.LLM(**options)
        tell_class(model, job)
        found = model.generate(prompts, vllm.SamplingParams(max_tokens=1, prompt_logprobs=0), **more)
        return [likelihood(row, one.prompt_logprobs) for row, one in zip(golden, found)]
    task = "classify" if architecture == "SequenceClassification" else "token_classify"
    # vLLM's class for whatever model of transformers pools the first token unless it is told otherwise.
    pooler = PoolerConfig(pooling_type="LAST") if task == "classify" else None
    model = vllm.LLM(**options, runner="pooling", pooler_config=pooler)
    tell_class(model, job)
    params = vllm.PoolingParams(use_activation=False)
    found = model.encode(prompts, pooling_params=params, pooling_task=task, **more)
    data = [one.outputs.data.double().numpy() for one in found]
    return [x[row["at"]] if task == "token_classify" else x.reshape(1, -1) for x, row in zip(data, golden)]


def tell_class(model: Any, job: dict[str, Any]) -> None:
    job["by"] = model.apply_model(lambda module: type(module).__name__)[0]


def likelihood(row: dict[str, Any], logprobs: list[Any]) -> np.ndarray:
    """The mean negative log-likelihood of the tokens after the first."""
    likely = [place[token].logprob for place, token in zip(logprobs[1:], row["token_ids"][1:])]
    return -np.mean(likely[: row["at"][-1]]).reshape(1, 1)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    said = {"error": None, "difference": None}
    begun = time.monotonic()
    try:
        found = outputs(job)
        agreed = [np.array(row["outputs"], np.float64) for row in job["golden"]]
        said["shapes"] = [x.shape for x in found]
        said["difference"] = max(float(np.abs(a - b).max()) for a, b in zip(found, agreed, strict=True))
        said["size"] = max(float(np.abs(a).max()) for a in agreed)
    except BaseException as error:
        traceback.print_exc()
        said["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    kept = {key: job.get(key) for key in ("family", "kind", "dtype", "by")}
    return {**kept, **said, "seconds": round(time.monotonic() - begun, 1)}


def in_a_process(job: dict[str, Any], path: Path, timeout: float) -> None:
    """Adds the answer to the file, or that there was none in time."""
    before, log = path.stat().st_size if path.exists() else 0, path.with_suffix(".log")
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1), os.dup2(sink, 2)
        line = json.dumps(answer(job)) + "\n"
        with path.open("a") as file:
            file.write(line)
        os._exit(0)
    end = time.monotonic() + timeout
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.1)
    if not path.exists() or path.stat().st_size == before:
        kept = {key: job[key] for key in ("family", "kind", "dtype")}
        said = f"ended without an answer, after at most {timeout:g} s"
        with path.open("a") as file:
            file.write(json.dumps({**kept, "difference": None, "error": said}) + "\n")
    print(path.read_text().splitlines()[-1], flush=True)


def main() -> None:
    path, timeout = Path(sys.argv[1]), float(sys.argv[2])
    import vllm.v1.engine.core
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.model_executor.models import registry

    # vLLM looks at a model's class in a process of its own, which imports everything again.
    registry._run_in_subprocess = lambda function: function()
    for job in json.load(sys.stdin):
        in_a_process(job, path, timeout)


if __name__ == "__main__":
    main()

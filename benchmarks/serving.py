"""Measures what `python -m rmjax.serve` answers under load, with dynamic batching and with batches of one request.

    python -m rmjax.main --config=configs/bt_tiny.py --workdir=runs/tiny
    python benchmarks/serving.py --model=runs/tiny/export

Starts the server on the loopback interface, waits until it is ready, and lets 1, 8 and 64 clients ask, each one request
after the other on one connection: POST /classify with one rendered conversation of the demo's data, no two alike.
Clients are in one process of their own, so that on two cores they compete with the server. A measurement ends after
`--requests` answers or `--seconds`, whichever is first. A latency is from the first byte sent to the last received.
Prints a Markdown table; a request that is not answered with 200 ends the benchmark.
"""

import argparse
import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
MODES = {"on": [], "off": ["--batch_tokens=1", "--max_wait_ms=0"]}
HEADER = "| batching | clients | requests/s | p50 ms | p95 ms | p99 ms | requests a batch | tokens/s |"


def bodies(model: str, count: int) -> list[bytes]:
    """Requests, at least `count`, for conversations of generated pairs that the demo was not trained on."""
    from rmjax.batches.chat import Chat, load_tokenizer
    from rmjax.data.records import BadRow, check_conversation
    from rmjax.data.sources import open_source

    chat, made = Chat(load_tokenizer(model)), []
    for _, row in open_source(f"synthetic://pairs?n={count}&seed=7"):
        for side in ("chosen", "rejected"):
            with contextlib.suppress(BadRow):  # the demo's data has a few, for the audit to find
                text = chat.render(check_conversation([*row["prompt"], *row[side]]))
                made.append(json.dumps({"input": text}).encode())
    return made


async def client(port: int, requests: Iterator[bytes], until: float, seconds: list[float]) -> None:
    """Asks one request after the other until there are none left or the time is over; notes the latency of each.

    Raises:
        RuntimeError: an answer other than 200.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for body in requests:
        begun = time.perf_counter()
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        answer = await reader.readexactly(int(length[1]) if length else 0)
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise RuntimeError(f"{head!r} {answer!r}")
        seconds.append(time.perf_counter() - begun)
        if time.perf_counter() > until:
            break
    writer.close()


async def load(port: int, requests: Sequence[bytes], clients: int, limit: float) -> tuple[float, list[float]]:
    """Seconds in which all clients were done, and the latency of each request."""
    shared, seconds = iter(requests), []  # type: Iterator[bytes], list[float]
    begun = time.perf_counter()
    await asyncio.gather(*(client(port, shared, begun + limit, seconds) for _ in range(clients)))
    return time.perf_counter() - begun, seconds


def counters(port: int) -> dict[str, float]:
    """The server's counters by name."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return {name: float(value) for name, value in re.findall(r"^(rmjax_\w+) (\S+)$", text, re.M)}


def start(model: str, options: Sequence[str]) -> tuple[subprocess.Popen[str], int]:
    """A server that is ready, and its port.

    Raises:
        RuntimeError: it ended.
    """
    argv = [sys.executable, "-m", "rmjax.serve", f"--model={model}", "--port=0", *options]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline() if process.stdout else ""
    while process.poll() is None:
        try:
            port = int(line.rpartition(":")[2])
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
            return process, port
        except urllib.error.URLError:  # not listening yet, or still compiling
            time.sleep(0.2)
    raise RuntimeError(f"the server ended with {process.returncode}")


def measure(mode: str, args: argparse.Namespace, requests: Sequence[bytes]) -> None:
    """Prints the rows of one mode."""
    process, port = start(str(Path(args.model).resolve()), MODES[mode])
    try:
        asyncio.run(load(port, requests[: args.warm], 4, args.seconds))
        for clients in args.clients:
            before = counters(port)
            took, seconds = asyncio.run(load(port, requests[args.warm :], clients, args.seconds))
            spent = {name: value - before[name] for name, value in counters(port).items() if name in before}
            each = spent["rmjax_batch_requests_sum"] / spent["rmjax_batch_requests_count"]
            p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1000
            rates = f"{len(seconds) / took:.0f} | {p50:.1f} | {p95:.1f} | {p99:.1f}"
            tokens = f"{spent['rmjax_tokens_total'] / took:,.0f}"
            print(f"| {mode} | {clients} | {rates} | {each:.1f} | {tokens} |", flush=True)
        process.send_signal(signal.SIGTERM)
        if code := process.wait(60):
            raise RuntimeError(f"the server ended with {code}")
    finally:
        process.kill()


def main() -> None:
    """Runs both modes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an export of the demo")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=2000, help="most of a measurement")
    parser.add_argument("--warm", type=int, default=20, help="requests before, which are not measured")
    parser.add_argument("--seconds", type=float, default=15.0, help="most of a measurement")
    args = parser.parse_args()
    requests = bodies(args.model, args.requests + args.warm)[: args.requests + args.warm]
    print(HEADER, "|---" * HEADER.count(" | ") + "|---|", sep="\n", flush=True)
    for mode in MODES:
        measure(mode, args, requests)


if __name__ == "__main__":
    main()

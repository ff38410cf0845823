"""The server's end, its limits and its time-outs, over real connections."""

import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn

from rmjax.batches.chat import Chat, load_tokenizer
from rmjax.serve import __main__ as command
from rmjax.serve import app, bodies, connections
from rmjax.serve.connections import Gate
from rmjax.serve.service import Service

ROOT = Path(__file__).parents[2]


class Model:
    """A model whose rewards are the first tokens, and that takes some time for a call."""

    def __init__(self, tokenizer_dir, seconds=0.0):
        self.chat = Chat(load_tokenizer(tokenizer_dir))
        self.config, self.labels, self.objective = SimpleNamespace(vocab=500), ["reward"], None
        self.has_spread = False
        self.inference = SimpleNamespace(work=SimpleNamespace(computed=0))
        self.mesh, self.seconds = SimpleNamespace(shape={"data": 1, "fsdp": 1}), seconds
        self.go = threading.Event()
        self.go.set()

    def outputs(self, sequences):
        self.go.wait(20)
        time.sleep(self.seconds)
        return np.array([[float(s[0])] for s in sequences], np.float32)

    def decode(self, outputs):
        return {"score": outputs[:, 0]}


def service_of(model, **options):
    made = Service(model, "tiny", **{"max_length": 300, "queue": 512, "batch_tokens": 1, "max_wait": 0.0, **options})
    made.warm_up, made.ready = lambda: None, True
    made.reader._frame.check = lambda ids: None  # here any ids are scored
    return made


@contextlib.contextmanager
def running(service, *, drain=30.0, seconds=30.0, most=512):
    """The server in a thread; gives its address and a function that stops it and waits for its end."""
    gate = Gate()
    built = app.build(service, gate=gate, seconds=seconds)
    options = {"log_level": "warning", "access_log": False, "ws": "none", "timeout_graceful_shutdown": 2}
    config = uvicorn.Config(built, http=connections.protocol(seconds, most), **options)
    server = connections.Server(config, gate, drain)
    listening = command._bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})

    def stop():
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()

    thread.start()
    try:
        until(lambda: server.started)
        yield SimpleNamespace(port=listening.getsockname()[1], server=server, gate=gate, stop=stop)
    finally:
        stop()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def post(port, body=None, **options):
    return httpx.post(f"http://127.0.0.1:{port}/pooling", json=body or {"input": [5]}, timeout=60, **options)


def plain_post(port, body):
    """The code of an answer. httpx takes longer to begin than these tests should."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        client.request("POST", "/pooling", json.dumps(body))
        answer = client.getresponse()
        assert answer.status != 503 or answer.headers["Retry-After"] == "1"
        answer.read()
        return answer.status


def outcomes(port, count, act, body=None):
    """Codes of requests that are sent at once; `act` is called while they are under way."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(plain_post, port, body or {"input": [5]}) for _ in range(count)]
        act()
        return collections.Counter(future.result() for future in futures)


@pytest.mark.parametrize(("seconds", "drain"), [(0.01, 30.0), (0.1, 1.0)])
def test_everybody_who_was_accepted_is_answered_when_it_stops(seconds, drain, tokenizer_dir, caplog):
    model = Model(tokenizer_dir, seconds)
    service = service_of(model)
    model.go.clear()
    with running(service, drain=drain) as one:

        def stop():
            until(lambda: one.gate.inside == 80)
            model.go.set()
            one.stop()

        found = outcomes(one.port, 80, stop)
    assert sum(found.values()) == 80 and set(found) <= {200, 503} and found[200] > 5
    assert (found[503] > 20) == (drain < 10), found
    assert not [record for record in caplog.records if record.exc_info]
    assert not service.busy


def test_a_kept_connection_is_told_of_the_stop(tokenizer_dir):
    with running(service_of(Model(tokenizer_dir, 1.0)), drain=20) as one, httpx.Client() as client:
        url = f"http://127.0.0.1:{one.port}"
        assert client.get(f"{url}/health").status_code == 200
        with concurrent.futures.ThreadPoolExecutor() as pool:
            first = pool.submit(post, one.port)
            until(lambda: one.gate.inside)
            stopped = pool.submit(one.stop)
            until(lambda: one.gate.closed)
            late = client.post(f"{url}/pooling", json={"input": [5]})
            assert first.result().status_code == 200
            stopped.result()
    assert late.status_code == 503 and late.headers["retry-after"] == "1" and late.headers["connection"] == "close"
    assert "stopping" in late.json()["error"]["message"]


PROGRAM = """
import sys, time
sys.path[:0] = ["tests", "tests/serve"]
import test_serve_stop as t
from rmjax.serve import __main__ as serve
serve._service = lambda args: t.service_of(t.Model(sys.argv[1], 100.0))
serve.main(["--model=x", "--port=0", "--drain_seconds=0.5"])
"""


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_model_that_does_not_return_does_not_hold_the_end_up(how, code, tokenizer_dir):
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    argv = [sys.executable, "-c", PROGRAM, str(tokenizer_dir)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(argv, env=env, cwd=ROOT, **pipes)
    try:
        port = int(process.stdout.readline().rpartition(":")[2])
        until(lambda: _reachable(port))
        found = outcomes(port, 60, lambda: time.sleep(1.5) or process.send_signal(how))
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert found == {503: 60} and process.returncode == code and "Traceback" not in errors, errors


def _reachable(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_a_real_model_is_stopped_in_the_middle(tmp_path, tokenizer_dir):
    import tiny_models
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "num_hidden_layers": 4}
    tiny_models.make_hf_model("llama", tmp_path, **sizes)
    tokenizer.save_pretrained(tmp_path)
    argv = [sys.executable, "-m", "rmjax.serve", f"--model={tmp_path}", "--port=0", "--drain_seconds=1"]
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*argv, "--batch_tokens=512", "--queue=10000"], env=env, **pipes)
    try:
        port = int(process.stdout.readline().rpartition(":")[2])
        until(lambda: _reachable(port), 120)
        turns = [{"role": "user", "content": "a " * 100}, {"role": "assistant", "content": "b " * 10}]
        body = {"input": [tokenizer.apply_chat_template(turns, tokenize=False)] * 100}
        found = outcomes(port, 80, lambda: time.sleep(3) or process.send_signal(signal.SIGTERM), body)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert set(found) <= {200, 503} and process.returncode == 0 and "Traceback" not in errors, (found, errors)


# Time-outs and limits


def _said(port, *parts, pause=0.05):
    """What the server says to bytes sent in parts, until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        for part in parts:
            plain.sendall(part)
            time.sleep(pause)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while part := plain.recv(65536):
                said += part
        return said


HEAD = b"POST /pooling HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\n\r\n"


def test_who_sends_slowly_or_nothing_is_dropped(tokenizer_dir):
    service = service_of(Model(tokenizer_dir))
    with running(service, seconds=0.5) as one:
        begun = time.monotonic()
        assert _said(one.port) == b""  # a connection without a request
        assert _said(one.port, HEAD[:30]) == b""  # half a head
        whole = HEAD + b'{"input": [5]}'
        assert _said(one.port, whole, b"P").count(b"HTTP/1.1") == 1  # half a head of a second request
        slow = _said(one.port, HEAD, b'{"in')
        assert slow.startswith(b"HTTP/1.1 408") and b"within 0.5 seconds" in slow
        assert time.monotonic() - begun < 10
        until(lambda: not one.server.server_state.connections)
        assert _said(one.port, HEAD, b'{"input": ', b"[5]}", b"P").startswith(b"HTTP/1.1 200")


def test_connections_have_a_limit_and_health_is_answered_beyond_it(tokenizer_dir, monkeypatch):
    monkeypatch.setattr(connections, "SPARE", 2)
    with running(service_of(Model(tokenizer_dir)), most=3) as one, contextlib.ExitStack() as opened:
        address = ("127.0.0.1", one.port)
        for _ in range(3):
            opened.enter_context(socket.create_connection(address, timeout=20))
        until(lambda: len(one.server.server_state.connections) == 3)
        refused = post(one.port)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert httpx.get(f"http://127.0.0.1:{one.port}/health").status_code == 200
        for _ in range(2):
            opened.enter_context(socket.create_connection(address, timeout=20))
        until(lambda: len(one.server.server_state.connections) >= 5)
        with pytest.raises(httpx.TransportError):
            post(one.port)
        opened.close()
        until(lambda: not one.server.server_state.connections)
        assert post(one.port).status_code == 200


def test_bodies_in_memory_have_a_limit(tokenizer_dir, monkeypatch):
    monkeypatch.setattr(bodies, "MOST_HELD", 2_000)
    monkeypatch.setattr(bodies.Bodies.__init__, "__defaults__", (2_000,))
    with running(service_of(Model(tokenizer_dir))) as one:
        with socket.create_connection(("127.0.0.1", one.port)) as slow:
            slow.sendall(b"POST /pooling HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n" + b" " * 1_500)
            until(lambda: one.gate.inside)
            until(lambda: post(one.port, {"input": "x" * 600}).status_code == 503)
            assert post(one.port).status_code == 200
        until(lambda: not one.gate.inside)
        assert post(one.port, {"input": "x" * 200}).status_code == 200


def test_a_small_request_is_answered_while_large_ones_are_tokenized(tokenizer_dir):
    model, go, begun = Model(tokenizer_dir), threading.Event(), threading.Event()
    service, plain = service_of(model), model.chat.encode
    large = lambda texts: any(len(text) > 150 for text in texts) and (begun.set() or go.wait(20))
    model.chat.encode = lambda texts: (large(texts) and None) or plain(texts)
    with running(service) as one, concurrent.futures.ThreadPoolExecutor() as pool:
        many = {"text_1": "a b c d e f g " * 11, "text_2": ["x"] * 500}  # small, but rendered it is large
        waiting = [pool.submit(post, one.port, {"input": ["a b c d " * 20] * 500}) for _ in range(6)]
        url = f"http://127.0.0.1:{one.port}/score"
        waiting += [pool.submit(httpx.post, url, json=many, timeout=60) for _ in range(6)]
        assert begun.wait(10)
        assert post(one.port, {"input": "What is a tree?"}).status_code == 200 and not go.is_set()
        go.set()
        assert {answer.result().status_code for answer in waiting} <= {200, 503}


# The address


def test_an_address_is_one_servers_from_the_start_and_free_after_its_end():
    first = command._bind("127.0.0.1", 0)  # it does not listen yet: its model is being loaded
    port = first.getsockname()[1]
    with pytest.raises(ValueError, match=f"--port={port} cannot be used: Address already in use"):
        command._bind("127.0.0.1", port)
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    first.listen()
    with socket.create_connection(("127.0.0.1", port)) as client:
        accepted, _ = first.accept()
        accepted.close()  # by the server's side, whose address it then keeps for a minute
        client.recv(1)
    first.close()
    second = command._bind("127.0.0.1", port)
    with pytest.raises(ValueError, match="cannot be used"):
        command._bind("127.0.0.1", port)
    second.close()

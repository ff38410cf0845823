"""The server: scores of the model itself, batched, bounded and refused with words; and a graceful end."""

import asyncio
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
import tiny_models
import transformers
from prometheus_client.parser import text_string_to_metric_families

from rmjax.reward_model import RewardModel
from rmjax.serving import app
from rmjax.serving.batching import Batcher, QueueFull

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_dir):
    directory = tmp_path_factory.mktemp("served")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "num_hidden_layers": 1}
    tiny_models.make_hf_model("llama", directory, **sizes)
    tokenizer.save_pretrained(directory)
    made = RewardModel.load(directory)
    made.directory = directory
    return made


@pytest.fixture
def serve(model):
    """Makes a service; every one is closed afterwards."""
    made = []

    def start(**options):
        values = {"max_length": 300, "queue": 64, "batch_tokens": 4096, "max_wait": 0.0, **options}
        service = app.Service(model, "tiny", **values)
        service.ready = True
        made.append(service)
        return service

    yield start
    for service in made:
        service.batcher.close(10)


def ask(service, *requests):
    """Answers of POST (path, body) sent at the same time, in their order."""

    async def all_of_them():
        transport = httpx.ASGITransport(app.build(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            post = lambda path, body: client.post(
                path, **({"content": body} if isinstance(body, bytes) else {"json": body})
            )
            return await asyncio.gather(*(post(path, body) for path, body in requests))

    return asyncio.run(all_of_them())


def conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_every_route_gives_the_models_raw_scores(serve, model):
    talks = [conversation("What is a tree?", "A plant."), conversation("What is a tree?", "0 1 2 3")]
    expected = model.score(talks)
    texts = [model.chat.render(talk) for talk in talks]
    ids = model.chat.encode(texts)
    service = serve()
    classified, pooled, by_ids, one, messages, scored = ask(
        service,
        ("/classify", {"model": "tiny", "input": texts}),
        ("/pooling", {"input": texts}),
        ("/pooling", {"input": ids}),
        ("/classify", {"input": ids[1]}),
        ("/pooling", {"messages": talks[0]}),
        ("/score", {"text_1": "What is a tree?", "text_2": ["A plant.", "0 1 2 3"]}),
    )
    assert [x["probs"][0] for x in classified.json()["data"]] == pytest.approx(expected, abs=1e-5)
    assert [x["data"][0] for x in pooled.json()["data"]] == pytest.approx(expected, abs=1e-5)
    assert [x["data"][0] for x in by_ids.json()["data"]] == pytest.approx(expected, abs=1e-5)
    assert one.json()["data"][0]["probs"][0] == pytest.approx(expected[1], abs=1e-5)
    assert messages.json()["data"][0]["data"][0] == pytest.approx(expected[0], abs=1e-5)
    assert [x["score"] for x in scored.json()["data"]] == pytest.approx(expected, abs=1e-5)
    body = classified.json()
    assert body["object"] == "list" and body["model"] == "tiny" and body["data"][1]["num_classes"] == 1
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids)) and body["id"].startswith("classify-")


def test_normalized_rewards(serve, model):
    talk = conversation("What is a tree?", "A plant.")
    service = serve(normalize=(0.25, 2.0))
    pooled, scored = ask(
        service, ("/pooling", {"messages": talk}), ("/score", {"text_1": "What is a tree?", "text_2": "A plant."})
    )
    wanted = (model.score([talk])[0] - 0.25) / 2
    assert pooled.json()["data"][0]["data"][0] == pytest.approx(wanted, abs=1e-5)
    assert scored.json()["data"][0]["score"] == pytest.approx(wanted, abs=1e-5)


def test_requests_that_come_together_are_computed_together(serve, model):
    calls = []
    real = model.outputs
    counted = SimpleNamespace(**{name: getattr(model, name) for name in ("chat", "config", "labels", "objective")})
    counted.outputs = lambda sequences, prompts: (
        calls.append(len(sequences)) or time.sleep(0.05) or real(sequences, prompts)
    )
    counted.decode = model.decode
    service = app.Service(counted, "x", max_length=0, queue=999, batch_tokens=4096, max_wait=0.05)
    service.ready = True
    talks = [conversation(f"question {i}", f"answer {i * i}") for i in range(24)]
    answers = ask(service, *(("/pooling", {"messages": talk}) for talk in talks))
    found = [a.json()["data"][0]["data"][0] for a in answers]
    assert found == pytest.approx(model.score(talks), abs=1e-5)  # each its own
    assert sum(calls) == 24 and len(calls) <= 6
    text = asyncio.run(_get(service, "/metrics")).text
    metrics = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples if not s.labels}
    assert metrics["rmjax_batch_requests_sum"] == 24 and metrics["rmjax_waiting"] == 0
    assert metrics["rmjax_tokens_total"] == sum(
        len(x) for x in model.chat.encode([model.chat.render(t) for t in talks])
    )
    service.batcher.close(10)


async def _get(service, path):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app.build(service)), base_url="http://test") as client:
        return await client.get(path)


MALFORMED = {
    "no JSON": ("/classify", b"{", 400, "not JSON"),
    "a list": ("/classify", [1], 400, "expected an object"),
    "nothing": ("/classify", {}, 400, "expected one of `input`"),
    "both": ("/pooling", {"input": "x", "messages": []}, 400, "expected one of `input`"),
    "a number": ("/classify", {"input": 3}, 400, "expected text, texts, ids"),
    "mixed": ("/classify", {"input": ["x", 3]}, 400, "expected text, texts, ids"),
    "empty list": ("/classify", {"input": []}, 400, "expected text, texts, ids"),
    "empty text": ("/classify", {"input": ""}, 400, "input 0 has no tokens"),
    "unknown id": ("/classify", {"input": [5, 100_000]}, 400, "not of the vocabulary"),
    "negative id": ("/classify", {"input": [-1]}, 400, "not of the vocabulary"),
    "too long": ("/classify", {"input": [5] * 301}, 400, "has 301 tokens, at most 300"),
    "surrogate": ("/classify", b'{"input": "\\ud800"}', 400, "no Unicode"),
    "special tokens": ("/classify", {"input": "x", "add_special_tokens": True}, 400, "must be false"),
    "no answer": ("/pooling", {"messages": [{"role": "user", "content": "hi"}]}, 400, "ends with user"),
    "no messages": ("/pooling", {"messages": "hi"}, 400, "list of messages"),
    "no text_2": ("/score", {"text_1": "x"}, 400, "`text_2` is NoneType"),
    "counts": ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400, "2 texts in text_1 for 3"),
    "unknown path": ("/embeddings", {}, 404, "there is POST /classify"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_told_what_was_expected(name, serve):
    path, body, code, words = MALFORMED[name]
    (answer,) = ask(serve(), (path, body))
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == code and words in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}


def test_a_large_request_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(app, "MOST_BYTES", 1000)
    (answer,) = ask(serve(), ("/classify", {"input": "x" * 2000}))
    assert answer.status_code == 413


def test_an_error_of_the_model_is_told_without_a_traceback(serve, model):
    service = serve()
    broken = Batcher(lambda *_: 1 / 0, most=9, batch_tokens=99, max_wait=0)
    service.batcher.close(5)
    service.batcher = broken
    (answer,) = ask(service, ("/classify", {"input": "x"}))
    assert answer.status_code == 500 and "division" not in answer.text and "log" in answer.json()["error"]["message"]


def test_it_is_not_ready_before_it_is_compiled(serve):
    service = serve()
    service.ready = False
    assert asyncio.run(_get(service, "/health")).status_code == 503
    (answer,) = ask(service, ("/classify", {"input": "x"}))
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    service.warm_up()
    assert asyncio.run(_get(service, "/health")).status_code == 200
    assert asyncio.run(_get(service, "/v1/models")).json()["data"][0]["id"] == "tiny"


# The queue


def test_a_full_queue_is_told_at_once_and_nothing_accepted_is_lost():
    gate, seen = threading.Event(), []

    def run(sequences, prompts):
        gate.wait(10)
        seen.extend(s[0] for s in sequences)
        return np.array([[float(s[0])] for s in sequences])

    batcher = Batcher(run, most=4, batch_tokens=2, max_wait=0)
    first = batcher.submit([[0], [1]], [None] * 2)
    while batcher.waiting:
        time.sleep(0.001)  # the model has it
    queued = [batcher.submit([[n]], [None]) for n in (2, 3, 4, 5)]
    with pytest.raises(QueueFull, match="4 sequences are waiting"):
        batcher.submit([[6]], [None])
    assert queued[1].cancel()  # its client has gone
    gate.set()
    assert batcher.close(10)  # finishes what is queued
    assert first.result().tolist() == [[0], [1]] and [f.result()[0, 0] for f in (queued[0], *queued[2:])] == [2, 4, 5]
    assert seen == [0, 1, 2, 4, 5]
    with pytest.raises(QueueFull, match="stopping"):
        batcher.submit([[7]], [None])


@pytest.mark.slow
def test_a_real_server_answers_under_load_and_ends_gracefully(model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "rmjax.serve", f"--model={model.directory}", f"--port={port}", "--max_length=300"]
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url, talk = f"http://127.0.0.1:{port}", conversation("What is a tree?", "A plant.")
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None, process.stdout.read()
            time.sleep(0.2)
        answers: list[float] = []

        def client():
            for _ in range(20):
                answer = httpx.post(f"{url}/pooling", content=json.dumps({"messages": talk}), timeout=60)
                answers.append(answer.json()["data"][0]["data"][0])

        threads = [threading.Thread(target=client) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 160 and answers == pytest.approx([model.score([talk])[0]] * 160, abs=1e-5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.stdout.read()
    finally:
        process.kill()

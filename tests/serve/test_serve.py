"""The server: scores of the model itself, batched, bounded and refused with words; and a graceful end."""

import asyncio
import concurrent.futures
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

from rmjax import objectives
from rmjax.batches.chat import Chat
from rmjax.data import formats
from rmjax.inference import engine
from rmjax.inference.reward_model import RewardModel
from rmjax.serve import __main__ as command
from rmjax.serve import app, bodies, service
from rmjax.serve.batching import Batcher, QueueFull
from rmjax.serve.service import Service

ROOT = Path(__file__).parents[2]
WHOLE = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n"
OPTIONS = {"max_length": 300, "queue": 64, "batch_tokens": 4096, "max_wait": 0.0}


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


def known(sequence):
    """The reward that the stand-in gives a sequence."""
    return float(np.sin(np.arange(1, len(sequence) + 1) @ np.asarray(sequence)))


@pytest.fixture
def stand_in(model):
    """A model with the tokenizer of the real one, whose rewards are known and cost nothing."""
    names = ("chat", "config", "labels", "objective", "decode", "mesh", "inference", "has_spread")
    kept = {name: getattr(model, name) for name in names}
    return SimpleNamespace(**kept, outputs=lambda sequences: np.array([[known(s)] for s in sequences]))


@pytest.fixture
def serve(stand_in):
    """Makes a service, of the stand-in if no model is given; every one is closed afterwards."""
    made = []

    def start(model=stand_in, **options):
        made.append(Service(model, "tiny", **{**OPTIONS, **options}))
        made[-1].ready = True
        return made[-1]

    yield start
    for one in made:
        one.batcher.close(10)


def ask(service, *requests):
    """Answers of POST (path, body), or GET (path,), sent at the same time, in their order."""

    async def all_of_them():
        transport = httpx.ASGITransport(app.build(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            return await asyncio.gather(*(_send(client, *request) for request in requests))

    return asyncio.run(all_of_them())


def _send(client, path, *body):
    if not body:
        return client.get(path)
    return client.post(path, **({"content": body[0]} if isinstance(body[0], bytes) else {"json": body[0]}))


def conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def measured(service):
    """What /metrics says, by name and labels."""
    (answer,) = ask(service, ("/metrics",))
    families = text_string_to_metric_families(answer.text)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def test_every_route_gives_the_models_raw_scores(serve, model):
    talks = [conversation("What is a tree?", "A plant."), conversation("What is a tree?", "0 1 2 3")]
    expected = model.score(talks)
    texts = [model.chat.render(talk) for talk in talks]
    ids = model.chat.encode(texts)
    answers = ask(
        serve(model, max_wait=0.5),
        ("/classify", {"model": "tiny", "input": texts, "add_special_tokens": False, "use_activation": False}),
        ("/pooling", {"input": texts}),
        ("/pooling", {"input": ids}),
        ("/classify", {"input": ids[1]}),
        ("/pooling", {"messages": talks[0]}),
        ("/score", {"text_1": "What is a tree?", "text_2": ["A plant.", "0 1 2 3"]}),
        ("/score", {"queries": ["What is a tree?"] * 2, "documents": ["A plant.", "0 1 2 3"]}),
        ("/classify", {"text": texts}),
        ("/classify", {"text": texts[1]}),
        ("/classify", {"input_ids": ids[0]}),
    )
    classified, pooled, by_ids, one, messages, scored, asked, *sglang = (answer.json() for answer in answers)
    close = lambda values: pytest.approx(values, abs=1e-5)
    assert [x["probs"] for x in classified["data"]] == [close([x]) for x in expected]
    assert [x["data"] for x in pooled["data"]] == [close([x]) for x in expected]
    assert [x["data"][0] for x in by_ids["data"]] == close(expected)
    assert one["data"][0]["probs"][0] == close(expected[1])
    assert messages["data"][0]["data"][0] == close(expected[0])
    assert [x["score"] for x in scored["data"]] == close(expected)
    assert [x["score"] for x in asked["data"]] == close(expected)
    assert [x["embedding"] for x in sglang[0]] == [close([x]) for x in expected]
    assert sglang[1]["embedding"][0] == close(expected[1]) and sglang[2]["embedding"][0] == close(expected[0])
    assert sglang[1]["meta_info"]["prompt_tokens"] == len(ids[1])
    assert classified["object"] == "list" and classified["model"] == "tiny" and classified["id"].startswith("classify-")
    assert classified["data"][1]["num_classes"] == 1 and classified["data"][1]["label"] == model.labels[0]
    assert classified["usage"]["prompt_tokens"] == sum(map(len, ids)) == scored["usage"]["total_tokens"]


def test_normalized_rewards(serve, stand_in):
    talk = conversation("What is a tree?", "A plant.")
    pooled, scored = ask(
        serve(normalize=(0.25, 2.0)),
        ("/pooling", {"messages": talk}),
        ("/score", {"text_1": "What is a tree?", "text_2": "A plant."}),
    )
    wanted = (known(stand_in.chat.encode([stand_in.chat.render(talk)])[0]) - 0.25) / 2
    assert pooled.json()["data"][0]["data"][0] == pytest.approx(wanted)
    assert scored.json()["data"][0]["score"] == pytest.approx(wanted)


def test_a_judge_gives_probabilities_or_its_raw_outputs(serve, stand_in):
    judge = objectives.make({"name": "pairwise"})
    raw = np.array([[2.0, -1.0, 0.5][: len(judge.labels)]], np.float32)
    kept = {**vars(stand_in), "labels": judge.labels, "objective": judge}
    kept |= {"outputs": lambda sequences: raw, "decode": lambda outputs: judge.decode(outputs, {})}
    asked = [
        ("/classify", {"input": WHOLE, **more}) for more in ({}, {"use_activation": True}, {"use_activation": False})
    ]
    one = serve(SimpleNamespace(**kept))
    (default, yes, no), (refused,) = (
        [ask(one, a)[0] for a in asked],
        ask(one, ("/score", {"text_1": "a", "text_2": "b"})),
    )
    softmax = np.exp(raw[0]) / np.exp(raw[0]).sum()
    assert default.json()["data"][0]["probs"] == yes.json()["data"][0]["probs"] == pytest.approx(softmax.tolist())
    assert no.json()["data"][0]["probs"] == raw[0].tolist() and no.json()["data"][0]["label"] == judge.labels[0]
    assert refused.status_code == 400 and "not one reward; ask /classify" in refused.json()["error"]["message"]


def test_requests_that_come_together_are_computed_together(serve, stand_in):
    calls, plain = [], stand_in.outputs
    stand_in.outputs = lambda *batch: calls.append(len(batch[0])) or time.sleep(0.05) or plain(*batch)
    talks = [conversation(f"question {i}", f"answer {i * i}") for i in range(24)]
    ids = stand_in.chat.encode([stand_in.chat.render(talk) for talk in talks])
    one = serve(max_wait=0.05)
    answers = ask(one, *(("/pooling", {"messages": talk}) for talk in talks))
    assert [a.json()["data"][0]["data"][0] for a in answers] == pytest.approx([known(x) for x in ids])  # each its own
    assert sum(calls) == 24 and len(calls) <= 6
    ask(one, ("/classify", {}))
    found = measured(one)
    assert found["rmjax_batch_requests_sum",] == 24 and found["rmjax_batch_requests_count",] == len(calls)
    assert found["rmjax_tokens_total",] == sum(map(len, ids)) and found["rmjax_waiting",] == 0
    assert found["rmjax_requests_total", "/pooling", "200"] == 24
    assert found["rmjax_requests_total", "/classify", "400"] == 1
    assert found["rmjax_request_seconds_count", "/pooling"] == 24


def test_responses_of_one_prompt_share_it_whoever_asks(serve, model):
    """Eight requests, each of one response, that wait together: their prompt is computed once."""
    question = "What is a tree, and why do people plant so many of them beside their roads and their houses? " * 3
    asked = [("/pooling", {"messages": conversation(question, f"{i} reasons.")}) for i in range(8)]
    alone = [answer.json()["data"][0]["data"][0] for answer in ask(serve(model), asked[0], asked[7])]
    one, work = serve(model, max_wait=0.5), model.inference.work
    computed, unshared = work.computed, work.unshared
    answers = [answer.json()["data"][0]["data"][0] for answer in ask(one, *asked)]
    assert [answers[0], answers[7]] == pytest.approx(alone, abs=1e-5)
    assert measured(one)["rmjax_batch_requests_count",] == 1
    assert 3 * (work.computed - computed) < work.unshared - unshared == measured(one)["rmjax_tokens_total",]


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]


def test_messages_and_tools_are_read_as_training_reads_a_row(serve, stand_in, tokenizer):
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    stand_in.chat = Chat(tokenizer)
    talk = conversation("What is a tree?", "A plant.")
    other_names = [{"from": "human", "value": "What is a tree?"}, {"from": "gpt", "value": "A plant."}]
    marks = "hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\nWhat is a tree?"
    older = [*conversation("hi", "hello"), *talk]
    bodies = [
        ("/classify", {"messages": talk, "tools": TOOLS}),
        ("/pooling", {"messages": talk, "tools": json.dumps(TOOLS)}),
        ("/pooling", {"messages": other_names, "tools": []}),
        ("/pooling", {"messages": talk, "system": "Be brief."}),
        ("/score", {"text_1": talk[:1], "text_2": "A plant.", "tools": TOOLS}),
        ("/score", {"text_1": [older[:-1], "What is a tree?"], "text_2": ["A plant."] * 2}),
        ("/score", {"text_1": marks, "text_2": "A plant."}),
    ]
    row = {"messages": talk, "system": "Be brief.", "tools": TOOLS}
    record = formats.detect([row]).read(row, source="", where="")[0]
    wanted = [(talk, TOOLS), (talk, TOOLS), (talk, None), (record.conversations[0], None), (talk, TOOLS)]
    wanted += [(older, None), (talk, None), (older, None)]
    ids = stand_in.chat.encode([stand_in.chat.render(turns, tools) for turns, tools in wanted])
    given = [x for answer in ask(serve(), *bodies) for x in answer.json()["data"]]
    found = [float(np.ravel(next(x[key] for key in ("probs", "data", "score") if key in x))[0]) for x in given]
    assert found == pytest.approx(list(map(known, ids)))


MALFORMED = {
    "no JSON": ("/classify", b"{", 400, "not JSON"),
    "no UTF-8": ("/classify", b'{"input": "\xff"}', 400, "not JSON"),
    "deep": ("/classify", b"[" * 100_000, 400, "not JSON"),
    "a list": ("/classify", [1], 400, "expected an object"),
    "nothing": ("/classify", {}, 400, "expected one of `input`"),
    "both": ("/pooling", {"input": "x", "messages": []}, 400, "expected one of `input`"),
    "a number": ("/classify", {"input": 3}, 400, "`input` is int '3', expected text, texts, token ids"),
    "null": ("/classify", {"input": None}, 400, "`input` is missing"),
    "mixed": ("/classify", {"input": ["x", 3]}, 400, "expected text, texts, token ids"),
    "booleans": ("/classify", {"input": [True, False]}, 400, "expected text, texts, token ids"),
    "empty list": ("/classify", {"input": []}, 400, "expected text, texts, token ids"),
    "empty text": ("/classify", {"input": [WHOLE, ""]}, 400, "input 1 has no tokens"),
    "no ids": ("/classify", {"input": [[]]}, 400, "input 0 has no tokens"),
    "unknown id": ("/classify", {"input": [5, 100_000]}, 400, "has the token id 100000, the vocabulary has"),
    "negative id": ("/classify", {"input": [-1]}, 400, "has the token id -1"),
    "too long": ("/classify", {"input": [5] * 301}, 400, "has 301 tokens, at most 300"),
    "too many": ("/classify", {"input": ["x"] * 65}, 400, "has 65 sequences, at most 64"),
    "surrogate": ("/classify", b'{"input": "\\ud800"}', 400, "no Unicode"),
    "surrogate in messages": ("/score", b'{"text_1": "\\ud800", "text_2": "x"}', 400, "no Unicode"),
    "special tokens": ("/classify", {"input": "x", "add_special_tokens": True}, 400, "must be false"),
    "truncation": ("/pooling", {"input": "x", "truncate_prompt_tokens": 5}, 400, "must be null"),
    "activation": ("/classify", {"input": "x", "use_activation": True}, 400, "a reward is no probability"),
    "odd activation": ("/classify", {"input": "x", "use_activation": "no"}, 400, "expected true or false"),
    "another model": ("/classify", {"model": "gpt", "input": "x"}, 404, "'gpt' is not served here; `model` is tiny"),
    "no answer": ("/pooling", {"messages": [{"role": "user", "content": "hi"}]}, 400, "ends with user"),
    "no messages": ("/pooling", {"messages": "hi"}, 400, "list of messages"),
    "tools that are not shown": ("/classify", {"messages": conversation("q", "a"), "tools": TOOLS}, 400, "`tools`"),
    "tools of a text": ("/classify", {"input": "x", "tools": TOOLS}, 400, "`tools` goes with `messages`"),
    "odd tools": ("/score", {"text_1": "q", "text_2": "a", "tools": "all"}, 400, "tools is str 'all', expected a list"),
    "documents": (
        "/pooling",
        {"messages": conversation("q", "a"), "documents": ["d"]},
        400,
        "`documents` are not read",
    ),
    "odd role": ("/pooling", {"messages": [{"role": "king", "content": "x"}]}, 400, "role is str 'king'"),
    "null answer": ("/pooling", {"messages": conversation("q", None)}, 400, "has no text"),
    "odd prompt": (
        "/score",
        {"text_1": [3], "text_2": "a"},
        400,
        "`text_1` is int, expected text or a list of mess",
    ),
    "no text_2": ("/score", {"text_1": "x"}, 400, "`text_2` is missing"),
    "counts": ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400, "2 texts in text_1 for 3"),
    "sglang": ("/classify", {"text": {"a": 1}}, 400, "`text` is dict"),
    "unknown path": ("/embeddings", {}, 404, "there is POST /classify"),
    "wrong method": ("/classify", None, 405, "there is POST /classify"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_told_what_was_expected(name, serve):
    path, body, code, words = MALFORMED[name]
    (answer,) = ask(serve(), (path,) if body is None else (path, body))
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == code and words in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}


def test_a_large_request_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(bodies, "MOST_BYTES", 1000)
    (answer,) = ask(serve(), ("/classify", {"input": "x" * 2000}))
    assert answer.status_code == 413 and "1,000 bytes" in answer.json()["error"]["message"]


def test_an_error_of_the_model_is_told_without_a_traceback(serve, stand_in, caplog):
    stand_in.outputs = lambda *_: 1 / 0
    one = serve()
    for _ in range(2):  # the thread lives on
        (answer,) = ask(one, ("/classify", {"input": WHOLE}))
        assert answer.status_code == 500 and "division" not in answer.text
        assert "its log says more" in answer.json()["error"]["message"] and "ZeroDivisionError" in caplog.text


def test_it_is_not_ready_before_it_is_compiled(serve, stand_in):
    seen, plain = [], stand_in.outputs
    stand_in.outputs = lambda sequences, *_: seen.append((len(sequences), len(sequences[0]))) or plain(sequences)
    one = serve(max_length=300, batch_tokens=1024)
    one.ready = False
    health, refused = ask(one, ("/health",), ("/classify", {"input": "x"}))
    assert health.status_code == refused.status_code == 503 and refused.headers["retry-after"] == "1"
    one.warm_up()
    assert seen == list(engine.call_shapes(engine.LEAST_ROW, engine.LONGEST_ROW))
    health, models = ask(one, ("/health",), ("/v1/models",))
    assert (
        health.status_code == 200
        and models.json()["data"][0] | {"id": "tiny", "max_model_len": 300} == (models.json()["data"][0])
    )


def test_nothing_is_compiled_once_it_is_ready(serve, model):
    serve(model, max_length=256, batch_tokens=512).warm_up()
    compiled = engine._forward._cache_size()
    for count, length in ((1, 30), (5, 40), (9, 50), (32, 8), (2, 200), (16, 30)):
        model.outputs([[5] * length] * count)
    for prompt, count in ((200, 8), (10, 90), (100, 130)):  # trees: longer than any sequence, and of many responses
        model.outputs([[5] * prompt + [6 + i, 7, 8] for i in range(count)])
    rng = np.random.default_rng(0)
    for count in (3, 20, 40):  # sequences that share nothing
        model.outputs([rng.integers(5, 300, rng.integers(30, 250)).tolist() for _ in range(count)])
    assert engine._forward._cache_size() == compiled


def test_a_model_that_cannot_be_compiled_stops_the_server(serve, stand_in):
    stand_in.outputs = lambda *_: 1 / 0
    one, told = serve(), []
    one.ready = False

    async def start():
        built = app.build(one, on_failure=lambda: told.append(one.failure))
        async with built.router.lifespan_context(built):
            await asyncio.sleep(0.2)

    asyncio.run(start())
    assert isinstance(told[0], ZeroDivisionError) and not one.ready


# The queue


class Held:
    """A model that waits to be let go, and remembers what it computed: the first token of each sequence."""

    def __init__(self):
        self.begun, self.go, self.seen = threading.Event(), threading.Event(), []

    def __call__(self, sequences):
        self.begun.set()
        self.go.wait(10)
        self.seen += [s[0] for s in sequences]
        return np.array([[float(s[0])] for s in sequences])


def until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen")


def test_a_full_queue_is_told_at_once_and_nothing_accepted_is_lost():
    held = Held()
    batcher = Batcher(held, most=4, batch_tokens=2, max_wait=0)
    first = batcher.submit([[0], [1]])
    assert held.begun.wait(10)
    queued = [batcher.submit([[n]]) for n in (2, 3, 4, 5)]
    with pytest.raises(QueueFull, match="4 sequences are waiting"):
        batcher.submit([[6]])
    assert queued[1].cancel() and batcher.waiting == 3  # its client has gone, and makes room
    late = batcher.submit([[7]])
    held.go.set()
    assert batcher.close(10)  # finishes what is queued
    assert first.result().tolist() == [[0], [1]] and late.result() == [[7]]
    assert [f.result()[0, 0] for f in (queued[0], *queued[2:])] == [2, 4, 5]
    assert held.seen == [0, 1, 2, 4, 5, 7]
    with pytest.raises(QueueFull, match="stopping"):
        batcher.submit([[8]])


def test_who_waited_while_the_model_was_busy_does_not_wait_again():
    held = Held()
    batcher = Batcher(held, most=9, batch_tokens=100, max_wait=1.0)
    first = batcher.submit([[0] * 100])  # a full batch does not wait
    assert held.begun.wait(0.9)
    second = batcher.submit([[1]])
    time.sleep(1.0)
    held.go.set()
    assert first.result(5)[0, 0] == 0 and second.result(0.9)[0, 0] == 1
    batcher.close(5)


def test_a_batch_counts_what_its_requests_share_once():
    """A large request is a batch alone; eight of 210 tokens with one prompt of 200 have 199 and 11 for each."""
    held = Held()
    batcher = Batcher(held, most=99, batch_tokens=199 + 8 * 11, max_wait=0)
    batcher.submit([[0]])
    assert held.begun.wait(10)
    sizes: list[int] = []
    batcher._on_batch = lambda requests, tokens, seconds: sizes.append(requests)
    answers = [batcher.submit([[1] * 200 + [10 + i] * 10]) for i in range(8)]
    answers.append(batcher.submit([[2] * 300, [3] * 300]))
    answers += [batcher.submit([[4 + i] * 200]) for i in range(2)]
    held.go.set()
    assert batcher.close(10) and [len(answer.result()) for answer in answers] == [*[1] * 8, 2, 1, 1]
    assert sizes == [1, 8, 1, 1, 1]


def test_what_cannot_be_finished_in_time_is_told():
    held = Held()
    batcher = Batcher(held, most=4, batch_tokens=1, max_wait=0)
    batcher.submit([[0]])
    assert held.begun.wait(10)
    left = batcher.submit([[1]])
    assert not batcher.close(0.01) and left.cancelled()
    held.go.set()


def test_a_full_queue_is_503_over_http(serve, stand_in):
    held = stand_in.outputs = Held()
    one = serve(queue=2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(ask, one, ("/pooling", {"input": WHOLE}))
        assert held.begun.wait(10)
        second = pool.submit(ask, one, ("/pooling", {"input": [WHOLE, WHOLE]}))
        until(lambda: one.batcher.waiting == 2)
        (refused,) = ask(one, ("/pooling", {"input": WHOLE}))
        held.go.set()
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert first.result()[0].status_code == second.result()[0].status_code == 200 and len(held.seen) == 3


def test_a_request_whose_client_has_gone_is_never_computed(serve, stand_in, monkeypatch):
    monkeypatch.setattr(service, "ASK_SECONDS", 0.02)
    held = stand_in.outputs = Held()
    one = serve()
    busy = one.batcher.submit([[5]])
    assert held.begun.wait(10)
    body = json.dumps({"input": WHOLE}).encode()
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    sent, waited = [], []

    async def receive():
        waited.append(one.batcher.waiting)
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/pooling", "headers": [], "query_string": b"", "root_path": ""}
    asyncio.run(app.build(one)(scope, receive, send))
    assert sent[0]["status"] == 499 and max(waited) == 1 and one.batcher.waiting == 0
    held.go.set()
    assert busy.result(5)[0, 0] == 5 and one.batcher.close(5) and held.seen == [5]
    assert measured(one)["rmjax_requests_total", "/pooling", "499"] == 1


# The command


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--model is required"),
        (["--model=x", "--queue=0"], "--queue=0 must be from 1"),
        (["--model=x", "--max_wait_ms=nan"], "--max_wait_ms=nan must be from 0 to 60000"),
        (["--model=x", "--port=70000"], "must be from 0 to 65535"),
        (["--model=x", "--dtype=float61"], "is none of auto, float32"),
        (["--model=x", "--port=BUSY"], "cannot be used: Address already in use"),
        (["--model=/nowhere/at/all", "--port=0"], "/nowhere/at/all"),
    ],
)
def test_mistakes_of_the_command_are_one_paragraph(argv, words, capsys):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        argv = [arg.replace("BUSY", str(busy.getsockname()[1])) for arg in argv]
        with pytest.raises(SystemExit) as ended:
            command.main(argv)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main(["--model=x"])
    assert "pip install 'prometheus_client" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.release)])
def test_a_real_server_answers_what_it_accepted_and_ends(model, how):
    argv = [sys.executable, "-m", "rmjax.serve", f"--model={model.directory}", "--port=0", "--max_length=256"]
    argv += ["--batch_tokens=512", "--max_wait_ms=2000"]
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = process.stdout.readline().split()[-1]
        get = lambda path: httpx.get(url + path, timeout=60)
        until(lambda: _reachable(url))
        until(lambda: get("/health").status_code == 200)
        talks = [conversation("What is a tree?", f"It is {i}.") for i in range(8)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            post = lambda talk: httpx.post(f"{url}/pooling", json={"messages": talk}, timeout=60)
            answers = [pool.submit(post, talk) for talk in talks]
            until(lambda: "rmjax_waiting 8.0" in get("/metrics").text)  # accepted, and not begun
            process.send_signal(how)
            rewards = [answer.result().json()["data"][0]["data"][0] for answer in answers]
        assert rewards == pytest.approx(model.score(talks), abs=1e-5)
        assert process.wait(60) == (0 if how == signal.SIGTERM else 130), process.stdout.read()
    finally:
        process.kill()


def _reachable(url):
    try:
        return httpx.get(f"{url}/health", timeout=60).status_code in (200, 503)
    except httpx.TransportError:
        return False

"""The commands on a PEFT directory: what they serve and measure is what transformers and PEFT compute of it."""

import json

import numpy as np
import pytest
import tiny_exports
from test_serve import ask
from tiny_exports import TALK

from rmjax.batches.chat import Chat, load_tokenizer
from rmjax.evaluate import __main__ as evaluate
from rmjax.export import verify
from rmjax.serve import __main__ as serve

ANSWERS = ("They grow.", "A plant.", "0 1 2 3", "A graph without cycles is a tree too.")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tokenizer_dir):
    """A random adapter of a random base; it lies beside."""
    place = tmp_path_factory.mktemp("adapter")
    base = tiny_exports.write(place / "base", tokenizer_dir, 1, max_position_embeddings=512)
    return tiny_exports.adapt(place / "adapter", base, 2)


@pytest.fixture(scope="module")
def talks():
    return [[TALK[0], {"role": "assistant", "content": answer}] for answer in ANSWERS]


@pytest.fixture(scope="module")
def rewards(adapter, talks):
    """By PEFT."""
    chat = Chat(load_tokenizer(adapter))
    rows = [{"token_ids": ids, "at": [len(ids) - 1]} for ids in chat.encode([chat.render(talk) for talk in talks])]
    of = lambda directory: np.ravel(verify._by_transformers(directory, rows))
    assert np.abs(of(adapter) - of(adapter.parent / "base")).max() > 0.01  # it is no adapter that does nothing
    return of(adapter)


def test_an_adapter_is_served(adapter, talks, rewards):
    service = serve._service(serve.parser().parse_args([f"--model={adapter}"]))
    service.ready = True
    try:
        asked = [("/pooling", {"messages": talk}) for talk in talks]
        score = ("/score", {"text_1": TALK[0]["content"], "text_2": list(ANSWERS)})
        *pooled, scored = ask(service, *asked, score)
    finally:
        service.batcher.close(10)
    assert [answer.json()["data"][0]["data"][0] for answer in pooled] == pytest.approx(rewards, abs=1e-5)
    assert [x["score"] for x in scored.json()["data"]] == pytest.approx(rewards, abs=1e-5)


def test_an_adapter_is_measured(adapter, rewards, tmp_path, capsys):
    pairs = [(0, 1), (2, 3), (1, 2), (0, 3)]
    rows = [{"prompt": TALK[0]["content"], "chosen": ANSWERS[a], "rejected": ANSWERS[b]} for a, b in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "found.json"
    evaluate.main([f"--model={adapter}", f"--data={tmp_path / 'pairs.jsonl'}", f"--output={out}", "--mesh=fsdp=1"])
    metrics = json.loads(out.read_text())["sets"]["pairs"]["metrics"]
    margins = np.array([rewards[a] - rewards[b] for a, b in pairs])
    assert metrics["margin"]["value"] == pytest.approx(margins.mean(), abs=1e-5)
    assert metrics["accuracy"]["value"] == (margins > 0).mean()
    assert "Accuracy" in capsys.readouterr().out

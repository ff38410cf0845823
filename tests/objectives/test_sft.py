"""Supervised fine-tuning: what is learnt of a record, the sums, and that packing changes nothing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from made_up_answers import metrics_of
from ml_collections import ConfigDict
from tiny_models import make_hf_model

from rmjax import objectives
from rmjax.batches import loader, token_cache
from rmjax.batches.chat import Chat, load_tokenizer
from rmjax.batches.groups import Group
from rmjax.batches.trees import build_tree
from rmjax.config import defaults
from rmjax.data.records import BadRow, Record, Step, group, pair
from rmjax.evaluate import outcomes
from rmjax.judging.verdicts import parse_verdict
from rmjax.judging.writing import Writing, preferred
from rmjax.models import heads, hf
from rmjax.models.config import from_hf
from rmjax.objectives import sums as sums_lib
from rmjax.objectives.sft import SFT

ASK_PAIR = "{{ prompt }}\n[A] {{ response_a }}\n[B] {{ response_b }}"
ASK_SCORE = "{{ prompt }} {{ attributes | join(' ') }} {{ scale | join('-') }}\n{{ response }}"


def talk(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def answers(examples):
    return [example.conversations[0][-1]["content"] for example in examples]


# What is learnt


def test_of_a_pair_the_preferred_conversation_is_learnt():
    record = pair(talk("q", "good"), talk("q", "bad"), preference=0.3, weight=2.0)
    (example,) = Writing().examples(record)
    assert example.conversations == (record.conversations[1],) and example.name == ""
    assert [span.value for span in example.spans["loss_weight"][0]] == [2.0]
    with pytest.raises(BadRow, match="tie: no response is preferred"):
        Writing().examples(pair(talk("q", "a"), talk("q", "b"), preference=0.5))


def test_of_a_ranking_the_best_are_learnt():
    conversations = [talk("q", text) for text in "abcd"]
    wins = np.zeros((4, 4))
    wins[0, 2] = wins[1, 2] = wins[1, 3] = 1  # 0 and 1 are not compared; nobody says that 3 is good
    assert [c[-1]["content"] for c in preferred(group(conversations, wins=wins))] == ["a", "b"]
    cycle = np.roll(np.eye(4), 1, axis=1)
    with pytest.raises(BadRow, match="tie"):
        preferred(group(conversations, wins=cycle))
    examples = Writing().examples(group(conversations, attributes={"x": (1, 2, 3, 4)}))
    assert answers(examples) == list("abcd") and [e.name for e in examples] == list("0123")


def test_judges_of_pairs_and_scores():
    record = pair(talk("q", "good"), talk("q", "bad"))
    both = Writing(target="pair", template=ASK_PAIR, both_orders=True).examples(record)
    assert sorted(answers(both)) == ["<better>A</better>", "<better>B</better>"]
    for example in both:
        said, question = answers([example])[0], example.conversations[0][0]["content"]
        assert f"[{parse_verdict(said, 'better').value}] good" in question
        (span,) = example.spans["verdict"][0]
        assert said[span.start : span.stop] in "AB"
    (one,) = Writing(target="pair", template=ASK_PAIR).examples(record)
    assert answers([one])[0] in answers(both)
    with pytest.raises(BadRow, match="tie"):
        Writing(target="pair", template=ASK_PAIR, ties=False).examples(
            pair(talk("q", "a"), talk("q", "b"), preference=0.5)
        )
    rated = group([talk("q", "a"), talk("q", "b")], attributes={"help": (3, 4.5), "form": (1, 5)})
    judge = Writing(target="score", template=ASK_SCORE, attributes=("help",))
    assert answers(judge.examples(rated)) == ["<score>3</score>", "<score>4.5</score>"]
    several = Writing(target="score", template=ASK_SCORE).examples(rated)
    assert answers(several)[0] == "<help>3</help>\n<form>1</form>"
    said = [answers(several)[0][span.start : span.stop] for span in several[0].spans["verdict"][0]]
    assert said == ["3", "1"]
    with pytest.raises(BadRow, match="no_label"):
        judge.examples(record)


def test_what_is_cached_is_what_is_learnt(tokenizer, tmp_path):
    rows = [{"messages": talk("q", "A plant.", "and", "a graph")}, {"messages": talk("q", "yes")}]
    rows[0]["weight"] = 2.0
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for turns, expected in (("all", ["A plant.<|im_end|>a graph<|im_end|>"]), ("last", ["a graph<|im_end|>"])):
        built = token_cache.build(
            str(path), Chat(tokenizer), Writing(turns), format="messages", workers=0, cache_dir=tmp_path
        )
        for one, text in zip((built.group(i) for i in range(2)), [*expected, "yes<|im_end|>"]):
            weights = one.labels["loss_weight"]
            at = np.flatnonzero(weights)
            assert tokenizer.decode(one.tree.tokens[at + 1]) == text and not one.labels["verdict"].any()
            assert set(weights[at]) == {one.weight}


# Sums


def hand_worked():
    """Three conversations in a row of 10 tokens, two with verdicts, of two tokens and of one."""
    start = [0, 0, 0, 0, 4, 4, 4, 7, 7, 9]
    batch = {
        "visible_from": np.array([start], np.int32),
        "loss_weight": np.array([[0, 1, 1, 0, 2, 2, 0, 1, 0, 0]], np.float32),
        "verdict": np.array([[0, 1, 1, 0, 0, 2, 0, 0, 0, 0]], np.float32),
        "end": np.array([[3, 6, 8, 9, -1]], np.int32),
    }
    nll = np.array([[9, 0.5, 1.5, 9, 1, 2, 9, 0, 9, 9]], np.float32)
    correct = np.array([[1, 1, 0, 1, 0, 1, 1, 1, 1, 1]], np.float32)
    return {"nll": nll, "correct": correct}, batch


def test_hand_worked_sums():
    found = metrics_of(SFT(), *hand_worked())
    assert found["loss"] == pytest.approx((0.5 + 1.5 + 2 * 1 + 2 * 2 + 0) / 7)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    assert found["accuracy"] == pytest.approx((1 + 0 + 0 + 2 + 1) / 7)
    assert found["verdict_accuracy"] == pytest.approx(2 / 3)  # the first has a wrong token; the second weighs twice
    assert found["tokens"] == 5


def test_sums_add_over_rows_and_what_is_not_there_is_left_out():
    outputs, batch = hand_worked()
    two = lambda tree: {name: np.concatenate([x, x]) for name, x in tree.items()}
    assert metrics_of(SFT(), two(outputs), two(batch)) == pytest.approx(
        {**metrics_of(SFT(), outputs, batch), "tokens": 10}
    )
    nothing = 0 * batch["verdict"]
    assert "verdict_accuracy" not in metrics_of(SFT(), outputs, {**batch, "verdict": nothing})
    assert metrics_of(SFT(), outputs, {**batch, "loss_weight": nothing, "verdict": nothing}) == {"tokens": 0}
    with pytest.raises(ValueError, match=r"not all \[B, T\]"):
        SFT().loss_sums(outputs, {**batch, "verdict": batch["verdict"][:, :1]}, {})


def test_a_hopeless_loss_has_a_perplexity():
    outputs, batch = hand_worked()
    assert np.isfinite(metrics_of(SFT(), {**outputs, "nll": 1e4 + outputs["nll"]}, batch)["perplexity"])


# Rows


def random_groups(seed, count):
    """Conversations of one sequence with weights and verdicts, as the cache has them."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        n = int(rng.integers(5, 30))
        weight = np.where(rng.random(n) < 0.4, rng.uniform(0.5, 2), 0).astype(np.float32)
        weight[-2], weight[-1] = 1, 0
        verdict = np.where(np.arange(n) >= n - 3, weight, 0).astype(np.float32)
        labels = {"loss_weight": weight, "verdict": verdict}
        made.append(Group(build_tree([rng.integers(1, 97, n)]), labels, 1.0, ""))
    return made


def rows_of(rows, tokens):
    shape = loader.Shape(1, len(rows), tokens, 8, 8, 1, tuple(SFT().task.fields.items()))
    batch = loader.empty_rows(shape, len(rows))
    for b, groups in enumerate(rows):
        loader.fill_row(batch, b, groups, shape.labels)
    return batch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model in both frameworks."""
    directory = tmp_path_factory.mktemp("model")
    reference = make_hf_model("qwen2", directory, head=False, tie_word_embeddings=True, num_hidden_layers=2)
    config = from_hf(hf.read_config(directory))
    graph, shapes = heads.abstract(config, 0, architecture="CausalLM")
    params, _ = hf.load(directory, shapes, config, seed=0)

    def sums(params, batch):
        outputs = heads.merge(graph, params)(batch)
        loss = SFT().loss_sums(outputs, batch, {})
        return loss[0], (sums_lib.fraction(*loss), SFT().outcomes(outputs, batch, {}))

    step = jax.value_and_grad(sums, has_aux=True)
    return reference, params, jax.jit(step, compiler_options=quick.OPTIONS)


def test_packing_changes_nothing(model):
    _, params, step = model
    groups = random_groups(1, 7)
    told = lambda loss, seen: {"loss": np.array(loss, float), **outcomes.step_sums(SFT().task, jax.device_get(seen))}
    (_, packed), grads = step(params, rows_of([groups[:4], groups[4:]], 128))
    alone, alone_grads = {}, None
    for one in groups:
        (_, seen), slope = step(params, rows_of([[one]], 32))
        alone = sums_lib.add(alone, told(*seen)) if alone else told(*seen)
        alone_grads = slope if alone_grads is None else jax.tree.map(jnp.add, alone_grads, slope)
    together, apart = (sums_lib.to_metrics(s) for s in (told(*packed), alone))
    assert together.pop("perplexity") == pytest.approx(apart.pop("perplexity"), rel=1e-5)
    assert together == pytest.approx(apart, abs=1e-5) and together["loss"] > 0
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(alone_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)


def test_the_loss_is_that_of_transformers(model):
    import torch

    reference, params, step = model
    groups = random_groups(2, 5)
    for one in groups:
        one.labels["loss_weight"][:] = one.labels["loss_weight"] > 0
    (_, (loss, seen)), _ = step(params, rows_of([groups[:2], groups[2:]], 96))
    ours = outcomes.evaluation_metrics(SFT().task, jax.device_get(seen), np.array(loss, float))
    ids = torch.zeros((5, 32), dtype=torch.long)
    labels = torch.full((5, 32), -100)
    for i, one in enumerate(groups):
        n = len(one.tree)
        ids[i, :n] = torch.tensor(one.tree.tokens)
        at = np.flatnonzero(one.labels["loss_weight"]) + 1
        labels[i, at] = ids[i, at]
    with torch.no_grad():
        expected = reference(ids, attention_mask=(ids != 0).long(), labels=labels).loss.item()
    assert ours["loss"] == pytest.approx(expected, abs=1e-5)
    assert ours["tokens"] == (labels != -100).sum().item()


# Config


def test_made_from_the_config():
    config = defaults("sft").objective
    assert objectives.make(config) == SFT()
    config.target, config.template = "pair", ASK_PAIR
    made = objectives.make(config)
    assert made.architecture == "CausalLM" and made.labels == () and made.params() == {}
    assert made.task == Writing(target="pair", template=ASK_PAIR)
    again = objectives.make(json.loads(json.dumps({"name": "sft", **made.terms()})))
    assert again == made
    packaged = objectives.make(ConfigDict({"name": "sft", "target": "score"}))
    assert "{{ response }}" in packaged.task.template and packaged.terms()["template"] == packaged.task.template


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"turns": "first"}, "config.objective.turns='first' is none of all, last"),
        ({"target": "pairs"}, "config.objective.target='pairs' is none of messages, score, pair"),
        ({"template": "{{ prompt }}"}, "does nothing with config.objective.target='messages'"),
        ({"target": "pair", "template": "{{ prompt }}"}, "does not show response_a and response_b"),
        ({"target": "pair", "template": "nofile"}, "there is no judging template nofile"),
        ({"target": "score", "scale": (5.0, 1.0)}, r"config.objective.scale=\(5.0, 1.0\) must be the lowest"),
    ],
)
def test_what_cannot_be_used_is_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        SFT(**keys)


# Rows of every kind


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("pairs.json", {}, ""),
        ("booleans.json", {"turns": "last"}, ""),
        ("votes.json", {"target": "pair"}, "better"),
        ("talk_axes.json", {"target": "score", "attributes": ("overall",)}, "score"),
    ],
)
def test_what_is_learnt_of_a_set(name, options, expected, small_sets, thinking_dir, tmp_path):
    chat = Chat(load_tokenizer(thinking_dir), max_length=4096)
    objective = SFT(**options)
    built = token_cache.build(
        str(small_sets / name), chat, objective.task, workers=0, cache_dir=tmp_path, max_bad_fraction=0.5
    )
    assert len(built) >= 12
    for i in range(len(built)):
        one = built.group(i)
        learnt = chat.tokenizer.decode(one.tree.tokens[np.flatnonzero(one.labels["loss_weight"]) + 1])
        whole = chat.tokenizer.decode(one.tree.tokens)
        assert learnt.endswith("<|im_end|>") and whole.rstrip().endswith(
            learnt.rpartition("<|im_end|>")[0][-20:] + "<|im_end|>"
        )
        if expected:
            verdict = parse_verdict(learnt.removesuffix("<|im_end|>"), expected)
            said = chat.tokenizer.decode(one.tree.tokens[np.flatnonzero(one.labels["verdict"]) + 1])
            assert verdict.kind == expected and str(verdict.value).removesuffix(".0") in said


def test_what_was_judged_bad_is_not_imitated():
    none = np.zeros((1, 1), np.float32)
    made = lambda **said: Record((tuple(talk("q", "a")),), none, none, none, **said)
    steps = lambda *labels: (tuple(Step(1, label) for label in labels),)
    for good, bad in (
        (made(attributes={"label": (1.0,)}), made(attributes={"label": (0.0,)})),
        (made(steps=steps(1.0, 1.0)), made(steps=steps(1.0, 0.0))),
    ):
        assert len(Writing().examples(good)) == 1
        with pytest.raises(BadRow, match="labelled_bad"):
            Writing().examples(bad)

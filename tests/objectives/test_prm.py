"""Process rewards: the loss against torch, first errors against plain loops, and the tokens at which steps end."""

import json
import math

import jax
import numpy as np
import pytest
import transformers
from made_up_answers import metrics_of, sums_of

from rmjax import objectives
from rmjax.batches import loader
from rmjax.batches.chat import Chat, Labelled
from rmjax.batches.groups import Group
from rmjax.batches.trees import Tree
from rmjax.config import defaults
from rmjax.data.formats.steps import joined_steps
from rmjax.data.records import BadRow, Record, Step
from rmjax.objectives import sums as sums_lib
from rmjax.objectives.prm import ProcessReward

NAN = math.nan
MOST = 64  # scored tokens of a row; all batches have one shape


def record(*responses, labels=None, prompt="What is a tree?"):
    """A record whose responses are given as (separator, steps)."""
    joined = []
    for k, (separator, steps) in enumerate(responses):
        joined.append(joined_steps(list(steps), labels[k] if labels else [True] * len(steps), separator))
    conversations = tuple(
        ({"role": "user", "content": prompt}, {"role": "assistant", "content": text}) for text, _ in joined
    )
    nothing = np.zeros((len(joined), len(joined)), np.float32)
    return Record(conversations, nothing, nothing, nothing, steps=tuple(tuple(steps) for _, steps in joined))


def labelled(chat, records, keep=False):
    task = ProcessReward().task
    return chat.groups([example for r in records for example in task.examples(r)], keep=keep)


def scored_texts(chat, group):
    """What each scored token sees, as text."""
    return [chat.tokenizer.decode(tokens) for tokens in group.tree.sequences()]


# Scored tokens


@pytest.mark.parametrize(
    "separator, steps",
    [
        ("\n", ("A tree is a plant.", "It has no cycles.", "So be it.")),
        ("\n\n", ("A tree is", "a graph", "without cycles")),
        ("", ("A tree.\n", "A plant.\n\n", "Late\n")),  # ends in newlines
        ("", ("\nA tree\n\n\n", "\n\nis late")),  # and begins with one, which merges with the template's
        ("\n", ("naïve café", "日本語の木", "🙂👩‍👩‍👧", "مرحبا")),  # characters of several bytes and tokens
        (" ", ("1 + 1 = 2", "so 2 + 2 = 4.", "4")),
    ],
)
def test_each_step_is_scored_where_its_last_character_is(tokenizer, separator, steps):
    chat = Chat(tokenizer)
    given = record((separator, steps))
    (group,) = labelled(chat, [given])
    text = given.conversations[0][-1]["content"]
    header = chat.render(given.conversations[0]).partition(text)[0]
    whole = chat.encode([chat.render(given.conversations[0])])[0]
    for step, end in zip(given.steps[0], group.tree.end):
        seen = chat.tokenizer.decode(whole[: end + 1])
        before = chat.tokenizer.decode(whole[:end])
        assert seen.startswith(header + text[: step.stop])  # the character is seen whole
        assert not before.startswith(header + text[: step.stop])  # and the token before did not see it
    assert len(group.tree.end) == len(steps) and not group.tree.end_slot.any()


def test_scored_tokens_where_the_template_thinks(thinking_dir):
    chat = Chat(transformers.AutoTokenizer.from_pretrained(str(thinking_dir)))
    steps = ("Janet has 16 − 3 = 13 eggs.", "日本語🙂 step", "She makes $26.\n", "The answer is 26")
    given = record(("\n\n", steps))
    (group,) = labelled(chat, [given])
    text = given.conversations[0][-1]["content"]
    start = chat.render(given.conversations[0]).index(text)
    for step, seen in zip(given.steps[0], scored_texts(chat, group)):
        assert seen.startswith(chat.render(given.conversations[0])[: start + step.stop])
        assert len(seen) <= start + step.stop + 2  # a newline that follows may stand in the same token


def test_a_template_that_strips_moves_the_last_step_to_the_last_character(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    )
    chat = Chat(tokenizer)
    (group,) = labelled(chat, [record(("", ("  \n A tree.\n", "A plant.\n\n")))])
    assert [text.rpartition("assistant\n")[2] for text in scored_texts(chat, group)] == [
        "A tree.\n",
        "A tree.\nA plant.",
    ]


def test_a_step_that_the_template_leaves_out_cannot_be_scored(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
        "{% endfor %}"
    )
    chat = Chat(tokenizer)
    (bad,) = labelled(chat, [record(("", ("<think>A step.</think>", "Another.")))])
    assert isinstance(bad, BadRow) and bad.reason == "template_error"
    (good,) = labelled(chat, [record(("", ("A step.", "Another.")))])
    assert isinstance(good, Labelled)


def test_responses_that_share_their_first_steps(tokenizer):
    chat = Chat(tokenizer)
    responses = [
        ("\n", ("A tree is a plant.", "It has no cycles.", "So be it.")),
        ("\n", ("A tree is a plant.", "Late")),
    ]
    (group,) = labelled(chat, [record(*responses, labels=[[1, 1, 0], [1, 0]])])
    apart = [labelled(chat, [record(response)])[0] for response in responses]
    assert group.tree.end_slot.tolist() == [0, 0, 0, 1, 1]
    assert scored_texts(chat, group) == [text for one in apart for text in scored_texts(chat, one)]
    assert group.tree.end[0] == group.tree.end[3]  # one token, scored for both
    assert group.labels["value"].ravel().tolist() == [1, 1, 0, 1, 0]
    assert len(group.tree) < sum(len(one.tree) for one in apart)


def test_truncation_takes_labels_along(tokenizer):
    responses = [("\n", ("A tree.", "A plant.")), ("\n", ("Late.", "A graph without cycles is a tree."))]
    given = record(*responses, labels=[[1, 0.25], [0, 0.5]])
    longest = len(Chat(tokenizer).encode([Chat(tokenizer).render(given.conversations[1])])[0])
    chat = Chat(tokenizer, max_length=longest - 1, over_long="truncate_response")
    (group,) = labelled(chat, [given])
    assert group.tree.end_slot.tolist() == [0, 0, 1] and group.labels["value"].ravel().tolist() == [1, 0.25, 0]
    assert group.labels["mask"].shape == (3, 1)


def test_unjudged_steps_are_scored_but_not_labelled(tokenizer):
    task = ProcessReward().task
    (example,) = task.examples(record(("\n", "abc"), ("\n", "de"), labels=[[True, None, 0.5], [None, False]]))
    assert example.labels["value"].ravel().tolist() == [1, 0, 0.5, 0, 0]
    assert example.labels["mask"].ravel().tolist() == [1, 0, 1, 0, 1]
    assert example.scored == ((1, 3, 5), (1, 3))
    for labels in ([[None, None]], None):
        given = record(("\n", "ab"), labels=labels)
        with pytest.raises(BadRow, match="judged steps of every response"):
            task.examples(given if labels else Record(given.conversations, given.wins, given.ties, given.margin))


# Loss and metrics


def make_batch(b=4, seed=0, soft=False):
    """Rows of 2 to 4 groups of 1 to 3 responses of 1 to 5 steps, laid by the loader; outputs [B, E, 2]."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(b):
        groups = []
        for g in range(rng.integers(2, 5)):
            counts = rng.integers(1, 6, rng.integers(1, 4))
            slots, n = np.repeat(np.arange(len(counts)), counts), counts.sum()
            value = rng.random((n, 1)) if soft else rng.integers(0, 2, (n, 1))
            mask = rng.random((n, 1)) < 0.8
            tree = loader_tree(slots)
            labels = {"value": (value * mask).astype(np.float32), "mask": mask.astype(np.float32)}
            groups.append(Group(tree, labels, float(rng.uniform(0.5, 2)), str(g)))
        rows.append(groups)
    fields = tuple(ProcessReward().task.fields.items())
    shape = loader.Shape(1, b, MOST, 5, MOST, 3, fields)
    batch = loader.empty_rows(shape, b)
    for i, row in enumerate(rows):
        loader.fill_row(batch, i, row, fields)
    outputs = rng.normal(size=(b, MOST, 2)).astype(np.float32) * (batch["end"] >= 0)[..., None]
    return outputs, batch


def loader_tree(slots):
    n = np.arange(len(slots), dtype=np.int32)
    return Tree(n, n, np.full(len(n), len(n), np.int32), n, slots.astype(np.int32))


def values_of(outputs, batch):
    return metrics_of(ProcessReward(), outputs, batch)


def responses_of(batch):
    """Indices (row, [ends]) of each response, by plain loops."""
    found = {}
    for b, e in zip(*np.nonzero(batch["end"] >= 0)):
        found.setdefault((b, batch["end_group"][b, e], batch["end_slot"][b, e]), []).append(e)
    return found


@pytest.mark.parametrize("soft", [False, True])
def test_loss_is_torchs_cross_entropy(soft):  # NUMERICS 8: rows, groups and responses are all above 1
    import torch
    import torch.nn.functional as F

    outputs, batch = make_batch(soft=soft)
    here = batch["mask"][..., 0] > 0
    label = batch["value"][here][:, 0]
    weight = torch.tensor(np.take_along_axis(batch["weight"], np.maximum(batch["end_group"], 0), 1)[here])
    target = torch.tensor(np.stack([1 - label, label], 1)) if soft else torch.tensor(label).long()
    losses = F.cross_entropy(torch.tensor(outputs[here]), target, reduction="none")
    expected = ((losses * weight).sum() / weight.sum()).item()
    assert values_of(outputs, batch)["loss"] == pytest.approx(expected, rel=1e-6)


def test_hard_labels_are_transformers_token_classification_loss():
    import torch
    from transformers.loss.loss_utils import ForTokenClassification

    outputs, batch = make_batch()
    batch["weight"][:] = 1
    labels = np.where(batch["mask"][..., 0] > 0, batch["value"][..., 0], -100).astype(np.int64)
    config = transformers.Qwen2Config(num_labels=2)
    expected = ForTokenClassification(torch.tensor(outputs), torch.tensor(labels), config)
    assert values_of(outputs, batch)["loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_metrics_by_plain_loops(soft):
    import torch

    outputs, batch = make_batch(soft=soft)
    p = torch.softmax(torch.tensor(outputs), -1)[..., 1].numpy()
    table = {name: [] for name in ("accuracy", "accuracy_incorrect", "accuracy_correct", "first_error_accuracy")}
    steps = 0
    for (b, g, _), ends in responses_of(batch).items():
        judged = [e for e in ends if batch["mask"][b, e, 0]]
        right, predicted = ([bool(x >= 0.5) for x in side] for side in (batch["value"][b, judged, 0], p[b, judged]))
        weight, steps = batch["weight"][b, g], steps + len(judged)
        for r, q in zip(right, predicted):
            table["accuracy"].append((r == q, weight))
            table[f"accuracy_{'correct' if r else 'incorrect'}"].append((r == q, weight))
        if judged:
            first = [side.index(False) if False in side else None for side in (right, predicted)]
            table["first_error_accuracy"].append((first[0] == first[1], weight))
    expected = {
        name: np.average(*np.array(rows, float).T[:1], weights=np.array(rows)[:, 1]) for name, rows in table.items()
    }
    values = values_of(outputs, batch)
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert values["steps"] == steps and values["responses"] == len(table["first_error_accuracy"])
    there = p[batch["end"] >= 0]
    assert values["reward_mean"] == pytest.approx(there.mean(), rel=1e-5)
    assert values["reward_std"] == pytest.approx(there.std(), rel=1e-4)
    assert 0.2 < values["first_error_accuracy"] < 0.8


@pytest.mark.parametrize(
    "predicted, label, judged, hit",
    [
        ("++-", "++-", "111", True),
        ("+-+", "+--", "111", True),  # what comes after the first error is not asked
        ("++-", "+--", "111", False),
        ("+++", "+++", "111", True),  # no error is an answer
        ("+++", "++-", "111", False),
        ("++-", "+++", "111", False),
        ("-+-", "-+-", "011", True),  # an error predicted at a step that was not judged is nobody's
        ("+-+", "+?-", "101", False),
        ("-++", "?++", "011", True),
        ("---", "???", "000", None),
    ],
)
def test_first_errors_by_hand(predicted, label, judged, hit):
    row = lambda text, yes: np.array([[True] * 2 + [c == yes for c in text] + [True] * 2], np.float32)
    n = len(predicted)
    batch = {
        "end": np.array([[*range(2 + n), -1, -1]]),
        "end_group": np.array([[0] * 2 + [1] * n + [-1] * 2]),
        "end_slot": np.array([[1] * 2 + [0] * n + [-1] * 2]),
        "value": row(label, "+")[..., None],
        "mask": row(judged, "1")[..., None],
        "weight": np.array([[1.0, 2.0]], np.float32),
    }
    up = 2 * row(predicted, "+") - 1
    found = sums_of(ProcessReward(), np.stack([-up, up], -1), batch)  # the first response, of two right steps, is hit
    assert found["first_error_accuracy"].tolist() == [1 + 2 * (hit is True), 1 + 2 * (hit is not None)]
    assert found["responses_count"][0] == 1 + (hit is not None)


def test_unjudged_steps_and_absent_ends_change_nothing_and_get_no_gradient():
    outputs, batch = make_batch()
    other = dict(batch, value=np.where(batch["mask"] > 0, batch["value"], NAN))
    assert values_of(outputs, other) == values_of(outputs, batch)
    loss = jax.jit(jax.grad(lambda f, batch: ProcessReward().loss_sums(f, batch, {})[0]))
    gradient = loss(outputs, other)
    np.testing.assert_array_equal((np.array(gradient) != 0).all(-1), batch["mask"][..., 0] > 0)
    np.testing.assert_array_equal(gradient, loss(outputs, batch))


def test_gradient_by_finite_differences():
    outputs, batch = make_batch(soft=True)
    loss = jax.jit(lambda f: ProcessReward().loss_sums(f, batch, {})[0])
    gradient, step = np.array(jax.grad(loss)(outputs)), 0.05
    direction = np.random.default_rng(5).normal(size=outputs.shape).astype(np.float32)
    numeric = (loss(outputs + step * direction) - loss(outputs - step * direction)) / (2 * step)
    assert (gradient * direction).sum() == pytest.approx(float(numeric), rel=2e-3)


def test_sums_add_over_any_split():  # NUMERICS 9 and 18
    outputs, batch = make_batch()
    objective = ProcessReward()
    rows = [sums_of(objective, outputs[i : i + 1], {n: x[i : i + 1] for n, x in batch.items()}) for i in range(4)]
    total = rows[0]
    for row in rows[1:]:
        total = sums_lib.add(total, row)
    whole = sums_of(objective, outputs, batch)
    assert sums_lib.ratios(total) == pytest.approx(sums_lib.ratios(whole), rel=1e-5)


def test_shapes_that_would_broadcast_are_refused():
    outputs, batch = make_batch()
    for wrong in (batch | {"value": batch["value"][..., 0]}, batch | {"mask": batch["mask"][:, :3]}):
        with pytest.raises(ValueError, match=r"not \[B,E,1\]"):
            ProcessReward().loss_sums(outputs, wrong, {})
    with pytest.raises(ValueError, match=r"not \[B,E,1\]"):
        ProcessReward().loss_sums(outputs[..., :1], batch, {})


@pytest.mark.parametrize("difference", [-1e4, 0.0, 1e4])
def test_finite_for_any_output(difference):  # NUMERICS 10
    import torch

    outputs, batch = make_batch()
    outputs[..., 1] = outputs[..., 0] + difference
    assert all(map(math.isfinite, values_of(outputs, batch).values()))
    with np.errstate(all="raise", under="ignore"):
        score = ProcessReward().decode(outputs[0], {})["score"]
    np.testing.assert_allclose(score, torch.softmax(torch.tensor(outputs[0]), -1)[:, 1], rtol=1e-6)


def test_made_from_the_config_and_again_from_its_terms():
    objective = objectives.make(defaults("prm").objective)
    assert objective == ProcessReward() and objective.labels == ("incorrect", "correct")
    assert objective.architecture == "TokenClassification"
    assert objectives.make(json.loads(json.dumps({"name": "prm", **objective.terms()}))) == objective
    assert Step(3, 1.0) == joined_steps(["abc"], [True], "")[1][0]

"""Rewards inside other packages: tunix's trainers and OpenJudge's runners.

The packages need environments of their own, which only a release makes: `python -m pytest -m release` installs them.
"""

import asyncio
import importlib
import itertools
import json
import sys
import threading
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_exports
from own_environment import run_with

from rmjax.inference.reward_model import RewardModel
from rmjax.inference.tunix import TunixReward

PROMPTS = [[5, 6, 7], [9], [4, 4, 8, 3, 2]]
COMPLETIONS = [[8, 9], [3, 5, 7, 6], [10]]
PAD = 0


@pytest.fixture(scope="module")
def export(tmp_path_factory, tokenizer_dir):
    return tiny_exports.write(tmp_path_factory.mktemp("exports") / "one", tokenizer_dir, 3)


def padded(sequences, left):
    most = max(map(len, sequences))
    fill = lambda x: [PAD] * (most - len(x))
    return np.array([fill(x) + x if left else x + fill(x) for x in sequences], np.int32)


def at_the_end(scores):
    """Scores [B, T] of completions at their last tokens."""
    width = max(map(len, PROMPTS))
    return [float(scores[b, width + len(completion) - 1]) for b, completion in enumerate(COMPLETIONS)]


def expected(model):
    return model.outputs([a + b for a, b in zip(PROMPTS, COMPLETIONS)])[:, 0]


def test_the_module_scores_padded_batches_as_the_model_does(export):
    model = RewardModel.load(export)
    tokens = np.concatenate([padded(PROMPTS, left=True), padded(COMPLETIONS, left=False)], axis=1)
    real = tokens != PAD
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    causal = np.tril(np.ones((tokens.shape[1],) * 2, bool)) & real[:, None, :]
    scores, cache = TunixReward(model)(jnp.asarray(tokens), jnp.asarray(positions), None, jnp.asarray(causal))
    assert cache is None and scores.shape == (*tokens.shape, 1)
    np.testing.assert_allclose(at_the_end(scores[..., 0]), expected(model), rtol=1e-5)
    packed = [PROMPTS[0] + COMPLETIONS[0], [PAD], PROMPTS[1] + COMPLETIONS[1], PROMPTS[2] + COMPLETIONS[2], [PAD, PAD]]
    segments = np.repeat([[1, 0, 2, 3, 0]], list(map(len, packed)), axis=1)
    places = np.concatenate([np.arange(len(x)) for x in packed])[None]
    scores, _ = TunixReward(model)(
        jnp.array([[*itertools.chain(*packed)]]), jnp.asarray(places), segment_ids=jnp.asarray(segments)
    )
    ends = np.cumsum(list(map(len, packed)))[[0, 2, 3]] - 1
    np.testing.assert_allclose(scores[0, ends, 0], expected(model), rtol=1e-5)
    alone, _ = TunixReward(model)(jnp.array([[5, 6, 7, 8, 9]]), jnp.arange(5)[None])
    assert float(alone[0, -1, 0]) == pytest.approx(expected(model)[0], rel=1e-5)


def test_a_model_without_one_reward_is_refused(tmp_path, tokenizer_dir):
    judge = tiny_exports.write(tmp_path / "judge", tokenizer_dir, 3, kind="pairwise")
    with pytest.raises(ValueError, match="with the outputs A, B, tie; tunix takes one reward"):
        TunixReward(RewardModel.load(judge))


@pytest.fixture
def together(monkeypatch):
    """What computes for all who wait, without the package; `calls` are the conversations of each computation."""
    for name in ("openjudge", "openjudge.graders", "openjudge.graders.base_grader", "openjudge.graders.schema"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    sys.modules["openjudge.graders.base_grader"].BaseGrader = object
    monkeypatch.delitem(sys.modules, "rmjax.inference.openjudge", raising=False)
    module, calls, go = importlib.import_module("rmjax.inference.openjudge"), [], threading.Event()

    def rewards(talks):
        calls.append([talk[-1] for talk in talks])
        go.wait(20)
        if "bad" in calls[-1]:
            raise ValueError("cannot be read")
        return [float(len(talk[-1])) for talk in talks]

    yield module._Together(rewards), calls, go
    sys.modules.pop("rmjax.inference.openjudge", None)


def test_a_cancelled_grading_leaves_the_others_their_answers(together):
    group, calls, go = together

    async def main():
        first, *rest = [asyncio.create_task(group.ask([["q", "a" * n]])) for n in (1, 2, 3)]
        while not calls:
            await asyncio.sleep(0.01)
        first.cancel()  # the one that computes for all three
        await asyncio.sleep(0.01)
        go.set()
        found = await asyncio.wait_for(asyncio.gather(first, *rest, return_exceptions=True), 20)
        assert isinstance(found[0], asyncio.CancelledError) and found[1:] == [[2.0], [3.0]]

    asyncio.run(main())
    assert calls == [["a", "aa", "aaa"], ["a", "aa", "aaa"]]


def test_one_bad_conversation_spoils_no_other_grading(together):
    group, calls, go = together
    go.set()

    async def main():
        asked = [group.ask([["q", text]]) for text in ("ab", "bad", "c")]
        return await asyncio.gather(*asked, return_exceptions=True)

    good, bad, other = asyncio.run(main())
    assert (good, other) == ([2.0], [1.0]) and str(bad) == "cannot be read"
    assert calls == [["ab", "bad", "c"], ["ab"], ["bad"], ["c"]]


TUNIX = """
import json, sys
import jax.numpy as jnp
from tunix.rl import common
from rmjax import RewardModel
from rmjax.inference.tunix import TunixReward
prompts, completions = (jnp.array(json.loads(x)) for x in sys.argv[2:4])
scores = common.compute_score(TunixReward(RewardModel.load(sys.argv[1])), prompts, completions, pad_id=0, eos_id=1)
print(json.dumps(scores.tolist()))
"""

OPENJUDGE = """
import asyncio, json, sys
from openjudge.graders.schema import GraderError, GraderRank
from openjudge.runner.grading_runner import GradingRunner
from rmjax import RewardModel
from rmjax.inference.openjudge import RewardGrader
model = RewardModel.load(sys.argv[1])
calls, plain = [], model.score
model.score = lambda talks: calls.append(len(talks)) or plain(talks)
rows = [{"query": "Tell me of trees.", "response": text} for text in json.loads(sys.argv[2])]

async def main():
    one = await RewardGrader(model).aevaluate(**rows[0])
    results = await GradingRunner({"reward": RewardGrader(model)}).arun(rows + [{"query": "", "response": ""}])
    bad = results["reward"].pop()
    assert isinstance(bad, GraderError), bad
    several = {"query": rows[0]["query"], "response": [row["response"] for row in rows]}
    ranked = await RewardGrader(model, mode="listwise").aevaluate(**several)
    assert isinstance(ranked, GraderRank)
    return {"one": one.score, "scores": [r.score for r in results["reward"]], "rank": ranked.rank}

said = asyncio.run(main())
print(json.dumps({**said, "calls": calls}))
"""


@pytest.mark.release
def test_tunix_itself(export, tmp_path):
    model = RewardModel.load(export)
    given = [json.dumps(padded(x, left).tolist()) for x, left in ((PROMPTS, True), (COMPLETIONS, False))]
    scores = np.array(run_with(tmp_path, ["google-tunix"], TUNIX, export, *given))
    np.testing.assert_allclose(at_the_end(scores), expected(model), rtol=1e-4)


@pytest.mark.release
def test_openjudge_itself(export, tmp_path):
    model, texts = RewardModel.load(export), ["They grow.", "A tree is a plant.", "No."]
    question = {"role": "user", "content": "Tell me of trees."}
    wanted = model.score([[question, {"role": "assistant", "content": text}] for text in texts])
    said = run_with(tmp_path, ["py-openjudge"], OPENJUDGE, export, json.dumps(texts))
    assert said["scores"] == pytest.approx(wanted, rel=1e-4) and said["one"] == pytest.approx(wanted[0], rel=1e-4)
    assert said["rank"] == (np.argsort(np.argsort(-np.array(wanted))) + 1).tolist()
    assert max(said["calls"]) > 1  # those that came together were computed together

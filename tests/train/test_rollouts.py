"""A step's samples: what is read in them, what it is worth, and the batch that it becomes; with an engine that is made
up, so that no model is needed."""

import json
import math

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax import objectives, sharding
from rmjax.batches import prepare, token_cache
from rmjax.batches.prepare import Split
from rmjax.inference.engines import Recorded
from rmjax.inference.sampler import LENGTH, STOP, Response
from rmjax.judging import rewards
from rmjax.judging.rewards import Answer
from rmjax.judging.verdicts import Verdict
from rmjax.objectives.grpo import advantages
from rmjax.train import questions
from rmjax.train.rollouts import Judging, Rollouts, SamplerMismatch


def make_config(target="score", **values):
    config = config_lib.demo("grpo")
    config.data.train = "synthetic://ratings?n=40&seed=0" if target == "score" else "synthetic://pairs?n=40&seed=0"
    config.objective.target = target
    config.objective.template = (
        "{{ prompt }}\n{{ response }}" if target == "score" else "{{ prompt }}\n{{ response_a }}\n{{ response_b }}"
    )
    config.plan.row_tokens = 256
    config.plan.micro_rows = 2
    config.rollout.prompts_per_step, config.rollout.samples, config.rollout.max_tokens = 4, 4, 12
    config.update_from_flattened_dict(values)
    config_lib.check(config)
    return config


class Says:
    """An engine whose k-th answer to a prompt is a text that a function gives of its row and k."""

    def __init__(self, chat, say):
        self.chat, self.say, self.asked, self.loaded = chat, say, 0, []
        self.stop = sorted(chat.stops)[0]

    def load(self, params):
        self.loaded.append(params)

    def responses(self, prompts):
        for i, prompt in enumerate(prompts):
            self.asked += 1
            answers = []
            for k in range(4):
                text = self.say(prompt.row, k)
                ids = text if isinstance(text, list) else self.chat.tokenizer.encode(text, add_special_tokens=False)
                cut_off = isinstance(text, str) and text.endswith("...")
                tokens = np.array(ids if cut_off else [*ids, self.stop], np.int32)
                log_probs = np.full(len(tokens), -0.5, np.float32)
                answers.append(Response(tokens, log_probs, LENGTH if cut_off else STOP))
            yield i, answers


def make(tmp_path, say, target="score", **values):
    config = make_config(target, **values)
    objective = objectives.make(config.objective)
    chat = prepare.open_chat(config, tmp_path)
    groups = token_cache.build(config.data.train, chat, objective.task, cache_dir=tmp_path / "cache")
    plan = questions.plan_questions(config, groups, 1, None)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    shape = questions.batch_shape(config, objective, groups, plan, 1, config.plan.micro_rows)
    engine = Says(chat, say)
    rows = sharding.named(mesh, sharding.BATCH)
    return Rollouts(config, objective, chat, Split(groups, plan, shape), rows, engine, tmp_path / "rollouts"), engine


def ratings(row, k):
    return f"<score>{(1, 5, 5, 1)[(k + row) % 4]}</score>"


def test_a_batch_is_what_was_drawn(tmp_path):
    source, engine = make(tmp_path, ratings)
    params = object()
    batch = {name: np.asarray(x) for name, x in source.batch(0, params).items()}
    assert engine.loaded == [params] and engine.asked == 4
    lines = [json.loads(line) for line in (tmp_path / "rollouts" / "0.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == source.names(0) and {line["step"] for line in lines} == {0}
    assert batch["drawn"].sum() == 16
    actions = 0
    for line in lines:
        said = line["responses"]
        worth = np.array([response["reward"] for response in said])
        assert worth.tolist() == [float(response["verdict"] == line["label"]) for response in said]
        np.testing.assert_allclose([r["advantage"] for r in said], advantages(worth, "others"), rtol=1e-6)
        actions += sum(len(response["tokens"]) for response in said)
    assert batch["loss_weight"].sum() == actions  # each token of each sample, the end too
    weight, old = batch["loss_weight"] > 0, batch["old"]
    assert (old[weight] == -0.5).all()
    # "<score>5" and "<score>1" are two branches of two equal answers each, so half of the tokens stand there.
    assert weight.sum() < 0.6 * actions
    sums = source.sums(0)
    assert sums["dead"].tolist() == [0, 4] and sums["accuracy"].tolist() == [8, 16] and sums["shared"][0] > 0


def test_ids_are_never_tokenized_again(tmp_path):
    """The engine spells a verdict letter by letter; the batch has its ids, not those of the text."""
    spelled = {}

    def say(row, k):
        text = ratings(row, k)
        return spelled.setdefault(text, [spelling[0] for spelling in map(letters, text)])

    source, engine = make(tmp_path, say)
    tokenizer = engine.chat.tokenizer
    letters = lambda character: tokenizer.encode(character, add_special_tokens=False)
    batch = source.batch(0, None)
    text = ratings(0, 0)
    assert spelled[text] != tokenizer.encode(text, add_special_tokens=False)
    flat = np.asarray(batch["tokens"]).ravel().tolist()
    wanted = spelled[text]
    assert any(flat[i : i + 6] == wanted[-6:] for i in range(len(flat)))
    assert source.sums(0)["unreadable"].tolist() == [0, 16]


def test_a_step_of_dead_groups_is_empty(tmp_path):
    source, _ = make(tmp_path, lambda row, k: "<score>5</score>")
    batch = source.batch(0, None)
    assert not np.asarray(batch["loss_weight"]).any() and not np.asarray(batch["drawn"]).any()
    assert source.sums(0)["dead"].tolist() == [4, 4]


def test_dead_groups_count_for_the_divergence(tmp_path):
    source, _ = make(tmp_path, lambda row, k: "<score>5</score>", **{"objective.kl": 0.1})
    source._reference = lambda batch: batch["old"]
    batch = source.batch(0, None)
    assert np.asarray(batch["drawn"]).sum() == 16 and not np.asarray(batch["up"]).any()
    assert np.asarray(batch["loss_weight"]).max() == 4


def test_dead_groups_count_among_what_was_drawn(tmp_path):
    """A question of four has one wrong answer, the others teach nothing: the loss is divided by all sixteen."""
    source, _ = make(tmp_path, lambda row, k: f"<score>{1 if (row, k) == (2, 1) else 5}</score>")
    assert np.asarray(source.batch(0, None)["drawn"]).sum() == 16
    assert source.sums(0)["dead"].tolist() == [3, 4]


def test_dead_groups_are_drawn_again(tmp_path):
    """Rows of the second draw are others; what was drawn before counts in what the loss is divided by."""
    source, engine = make(
        tmp_path, lambda row, k: ratings(row, k) if row >= 4 else "<score>5</score>", **{"rollout.dead": "resample"}
    )
    batch = source.batch(0, None)
    assert engine.asked == 8 and np.asarray(batch["drawn"]).sum() == 32
    assert source.sums(0)["dead"].tolist() == [0, 4]


@pytest.mark.parametrize("per, drawn", [("sample", 16), ("token", None)])
def test_what_the_loss_is_divided_by(tmp_path, per, drawn):
    source, _ = make(tmp_path, ratings, **{"objective.per": per})
    batch = source.batch(0, None)
    assert np.asarray(batch["drawn"]).sum() == (drawn or np.asarray(batch["loss_weight"]).sum())


def test_updates_share_a_rollout_which_is_read_again(tmp_path):
    source, engine = make(tmp_path, ratings, **{"objective.updates": 2})
    first, second, _ = (source.batch(step, None) for step in range(3))
    assert first is second and engine.asked == 8 and source.names(0) == source.names(1) != source.names(2)
    again, other = make(tmp_path, lambda row, k: "nothing", **{"objective.updates": 2})
    jax.tree.map(np.testing.assert_array_equal, again.batch(1, None), first)  # of a run that goes on there
    assert not other.asked


def test_both_orders_of_a_pair_are_one_question(tmp_path):
    source, engine = make(tmp_path, lambda row, k: f"<better>{'AB'[(row + k) % 2]}</better>", "pair")
    batch = source.batch(0, None)
    assert engine.asked == 8 and np.asarray(batch["drawn"]).sum() == 32
    lines = [json.loads(line) for line in (tmp_path / "rollouts" / "0.jsonl").read_text().splitlines()]
    for one, other in zip(lines[::2], lines[1::2]):
        assert {one["label"], other["label"]} == {"A", "B"} and one["id"] == other["id"]
        advantage = [r["advantage"] for line in (one, other) for r in line["responses"]]
        assert abs(sum(advantage)) < 1e-6  # a baseline of both
    assert source.sums(0)["first_position"].tolist() == [16, 32]


def test_the_step_fits_into_its_shape(tmp_path):
    """Answers as long as they may be, that share nothing."""
    rng = np.random.default_rng(0)
    for target in ("score", "pair"):
        say = lambda row, k: rng.integers(50, 600, 11).tolist()
        source, _ = make(tmp_path / target, say, target, **{"plan.row_tokens": 128, "plan.micro_rows": 1})
        source._judging.reward = lambda answer: float(rng.integers(2))
        for step in range(source.steps):
            assert np.asarray(source.batch(step, None)["loss_weight"]).sum()


def test_a_sampler_that_draws_from_another_model_stops_the_run(tmp_path):
    source, _ = make(tmp_path, ratings)
    source.check(0, {"mismatch": np.array([0.4, 1.0])})
    source.check(0, {"mismatch": np.array([0.0, 0.0])})
    with pytest.raises(SamplerMismatch, match=r"step 3: .* differ by 0.6 nats a token, at most 0.5"):
        source.check(3, {"mismatch": np.array([0.6, 1.0])})


# Verdicts and rewards


def answer(text, label=3.0, verdict=None, finish=STOP, **more):
    values = {
        **{"id": "row", "question": "", "text": text, "label": label, "strength": math.nan, "scale": (0.0, 4.0)},
        **{"tokens": 5, "finish": finish, "other": None, "verdict": verdict or Verdict("score", 3.0)},
    }
    return Answer(**{**values, **more})


NONSENSE = [  # what readers of others pay for (OpenJudge's, run on 2026-11-28)
    ("pair", "PRIORITIES: clarity, then depth.", False),
    ("pair", "neither is adequate", False),
    ("pair", "<think>I lean to <better>A</better> but", False),
    ("pair", "I lean to <better>A</better> but", True),  # within a thought that the template opened
    ("pair", "<better>A</better> or <better>B</better>", False),
    ("pair", "<better>A", False),
    ("pair", "The better one is A", False),
    ("score", "<score>-1</score>", False),
    ("score", "<score>10</score>", False),
    ("score", "<score>3/4</score>", False),
    ("score", "", False),
    ("score", "<think><score>4</score>", False),
    ("score", "<score>4</score> but on second thought", True),
]


@pytest.mark.parametrize("target, text, thinking", NONSENSE)
def test_nonsense_earns_what_the_unreadable_earns(tmp_path, target, text, thinking):
    from rmjax.judging import asked

    config = make_config(target, **{"objective.unreadable": -1.0})
    config.objective.scale = (0.0, 4.0)
    objective = objectives.make(config.objective)
    judging = Judging(config, objective, prepare.open_chat(config, tmp_path))
    verdict = asked.read(text, objective.task.writing, thinking=thinking)
    assert verdict.kind == "unparseable"
    for label in ("A", "B", "tie") if target == "pair" else (0.0, 1.0, 2.0, 4.0):
        assert judging.reward(answer(text, label, verdict)) == -1.0


def test_a_cut_off_answer_is_wrong_or_left_out(tmp_path):
    """Whatever it says; and what is left out is not in the mean of the others."""
    chat = prepare.open_chat(make_config(), tmp_path)
    for truncated, wanted in (("wrong", 0.0), ("drop", math.nan)):
        config = make_config(**{"rollout.truncated": truncated})
        judging = Judging(config, objectives.make(config.objective), chat)
        said = answer("<score>3</score> since...", 3.0, finish=LENGTH)
        np.testing.assert_equal(judging.reward(said), wanted)
    assert judging.reward(answer("<score>3</score>", 3.0)) == 1.0

    say = lambda row, k: ("<score>5</score> five...", "<score>5</score>", "<score>1</score>", "<score>1</score>")[k]
    source, _ = make(tmp_path, say, **{"rollout.truncated": "drop"})
    batch = source.batch(0, None)
    assert np.asarray(batch["drawn"]).sum() == 12
    line = json.loads((tmp_path / "rollouts" / "0.jsonl").read_text().splitlines()[0])
    assert line["responses"][0]["reward"] is None and line["responses"][0]["advantage"] == 0
    assert abs(sum(r["advantage"] for r in line["responses"])) < 1e-6


def test_rewards_by_name():
    rate = lambda label, said: answer("", float(label), Verdict("score", float(said)))
    assert rewards.closeness(rate(0, 1)) == 0 and rewards.closeness(rate(1, 1)) == 1
    assert rewards.closeness(rate(2, 3)) == rewards.linear(rate(2, 3)) == 0.75
    np.testing.assert_allclose(rewards.decay(rate(4, 2)), math.exp(-1))
    better = lambda label, said, other: answer("", label, Verdict("better", said), other=Verdict("better", other))
    assert rewards.better(better("A", "A", "A")) == 1 and rewards.consistent(better("A", "A", "A")) == 0
    assert rewards.consistent(better("A", "A", "B")) == 1 and rewards.consistent(better("tie", "tie", "tie")) == 1


def test_a_reward_of_ones_own(tmp_path):
    @rewards.register("test_brief")
    def brief(said):
        return math.nan if said.tokens > 8 else 1.0 - 0.1 * said.tokens

    say = lambda row, k: "<score>5</score>" + " word" * k
    source, _ = make(tmp_path, say, **{"objective.reward": "test_brief", "rollout.max_tokens": 30})
    source.batch(0, None)
    line = json.loads((tmp_path / "rollouts" / "0.jsonl").read_text().splitlines()[0])
    assert [r["reward"] for r in line["responses"]] == [
        None if len(r["tokens"]) > 8 else 1 - 0.1 * len(r["tokens"]) for r in line["responses"]
    ]

    @rewards.register("test_fails")
    def fails(said):
        raise KeyError("length")

    source, _ = make(tmp_path, ratings, **{"objective.reward": "test_fails"})
    with pytest.raises(RuntimeError, match=r"the reward 'fails' of an answer about ratings:\d+ failed: KeyError"):
        source.batch(0, None)


# Config, and answers from elsewhere


@pytest.mark.parametrize(
    "values, said",
    [
        ({"rollout.samples": 1}, "config.rollout.samples=1 must be at least 2"),
        ({"rollout.max_tokens": 256}, "leaves no room for a question"),
        ({"eval.samples": 0}, "config.eval.samples=0"),
        ({"rollout.prompts_at_once": -1}, "config.rollout.prompts_at_once=-1 must not be negative"),
        ({"rollout.truncated": "keep"}, "config.rollout.truncated='keep' is none of wrong, drop"),
    ],
)
def test_what_cannot_be_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        make_config(**values)


def test_judgements_that_nobody_would_draw_are_refused():
    config = config_lib.demo("sft")
    config.objective.target, config.eval.samples = "messages", 8
    with pytest.raises(ValueError, match=r"config\.eval\.samples is for judges that write"):
        config_lib.check(config)
    config.eval.samples, config.eval.max_tokens = 0, 8
    with pytest.raises(ValueError, match=r"config\.eval\.max_tokens does nothing without"):
        config_lib.check(config)


@pytest.mark.parametrize("key", ["temperature", "top_p", "top_k"])
def test_there_is_no_other_way_to_draw_in_training(key):
    """A ratio of a truncated distribution has a mean below 1: what is drawn must be what is trained."""
    with pytest.raises((AttributeError, KeyError)):
        config_lib.defaults("grpo").rollout[key] = 0.8


def test_adam_is_warmed_up():
    assert config_lib.defaults("grpo").optim.warmup == "10 steps"


def test_answers_from_a_file(tmp_path):
    source, _ = make(tmp_path, ratings)
    first = source.batch(0, None)
    recorded, _ = make(tmp_path, ratings)
    recorded._engine = Recorded(tmp_path / "rollouts")
    recorded._directory = tmp_path / "others"
    jax.tree.map(np.testing.assert_array_equal, recorded.batch(0, None), first)
    with pytest.raises(FileNotFoundError, match="there are no rollouts"):
        Recorded(tmp_path / "nothing")
    (tmp_path / "bad.jsonl").write_text('{"prompt": [1], "responses": [{"tokens": [], "finish": "stop"}]}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1"):
        Recorded(tmp_path / "bad.jsonl")


def test_questions_without_answers_are_counted_before_anything_is_compiled(tmp_path):
    source, _ = make(tmp_path, ratings)
    source.batch(0, None)
    config = make_config(**{"rollout.source": str(tmp_path / "rollouts")})
    with pytest.raises(ValueError, match=r"has fewer than 4 answers .* to 36 of the 40 prompts"):
        questions.check(config, {}, source._groups, source._plan)
    with pytest.raises(ValueError, match="the model's context is 40"):
        questions.check(make_config(), {"max_position_embeddings": 40}, source._groups, source._plan)


def test_start_is_checked_with_the_rest():
    config = make_config()
    start = config_lib.demo("sft")
    with config.unlocked():
        config.start = ConfigDict(start.to_dict())
    with pytest.raises(ValueError, match=r"config\.start: config\.data\.train is empty"):
        config_lib.check(config)

"""A step's samples: what is read in them, what it is worth, and the batch that it becomes; with an engine that is made
up, so that no model is needed."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax import objectives, sharding
from rmjax.batches import prepare, token_cache
from rmjax.batches.prepare import Split
from rmjax.data import synthetic
from rmjax.data.formats import columns
from rmjax.data.records import BadRow
from rmjax.inference.engines import Recorded
from rmjax.inference.sampler import LENGTH, STOP, Response
from rmjax.judging import asked, rewards
from rmjax.judging.rewards import Answer
from rmjax.judging.verdicts import Verdict
from rmjax.objectives.grpo import advantages
from rmjax.report import audit_command
from rmjax.train import questions, training
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


# Columns of the row that a reward reads


@pytest.fixture
def referring():
    """The name of a reward that reads two columns of its row, which is unknown again afterwards."""

    @rewards.register("test_refers", columns=("reference", "meta.tests"))
    def refers(said):
        return float(said.text.startswith(said.columns["reference"])) + 0.1 * said.columns["meta.tests"][0]

    yield "test_refers"
    del rewards.REWARDS["test_refers"], rewards.COLUMNS["test_refers"]


def refer(row):
    """A made-up row with what "test_refers" reads, of which the text would be refused if nobody did."""
    text = f"The experts gave it {row['score']:g} points"
    return {**row, "reference": text, "meta": {"tests": [3], "url": "x"}}


def referring_rows(path, count=24, of=refer):
    rows = [of(row) for row in synthetic.rows("ratings", n=count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("target", ["score", "pair"])
def test_a_reward_reads_further_columns_of_its_row(tmp_path, target, referring):
    said = []

    @rewards.register(referring, columns=("reference", "meta.tests"))
    def keeps(answer):
        said.append(answer)
        return 0.0

    if target == "score":
        source = referring_rows(tmp_path / "rows.jsonl")
    else:
        pairs = [
            {**row, "reference": f"of {i}", "meta": {"tests": [i]}}
            for i, row in enumerate(synthetic.rows("pairs", n=24))
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        source = str(tmp_path / "rows.jsonl")
    verdict = "<score>5</score>" if target == "score" else "<better>A</better>"
    config = {"objective.reward": referring, "data.train": source}
    rollouts, _ = make(tmp_path, lambda row, k: verdict, target, **config)
    rollouts.batch(0, None)
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    assert len(said) == 4 * 4 * (1 if target == "score" else 2) and len({answer.id for answer in said}) == 4
    for answer in said:
        row = rows[int(answer.id.partition(":")[2].partition("#")[0])]
        assert answer.columns == {"reference": row["reference"], "meta.tests": row["meta"]["tests"]}


def test_columns_stay_with_their_rows_through_splits_samples_and_copies(tmp_path, referring):
    config = make_config(
        **{"objective.reward": referring, "data.train": referring_rows(tmp_path / "rows.jsonl", 60)},
        **{"data.validation_fraction": 0.2, "data.sample": "50%", "data.workers": 0},
        **{"data.cache_dir": str(tmp_path / "cache"), "plan.row_tokens": 512},
    )
    chat, task = prepare.open_chat(config, tmp_path), objectives.make(config.objective).task
    of_rows = [refer(row) for row in synthetic.rows("ratings", n=60)]
    for _ in range(2):  # built, and mapped again
        train, validation = prepare.read_groups(config, chat, task)
        assert len(train) < 40 and len(validation)
        for groups in (train, validation):
            for i in range(len(groups)):
                group = groups.group(i)
                row = of_rows[int(group.id.partition(":")[2])]
                assert group.columns == {"reference": row["reference"], "meta.tests": [3]}
                assert asked.labels_of(group.labels).tolist() == [row["score"]]


def test_validation_data_may_lack_the_columns_or_have_them(tmp_path, referring):
    plain = referring_rows(tmp_path / "plain.jsonl", 8, lambda row: row)
    keys = {"objective.reward": referring, "data.train": referring_rows(tmp_path / "rows.jsonl")}
    keys |= {"data.workers": 0, "data.cache_dir": str(tmp_path / "cache")}
    for name in (plain, keys["data.train"]):
        config = make_config(**keys, **{"data.validation": name})
        chat, task = prepare.open_chat(config, tmp_path), objectives.make(config.objective).task
        train, validation = prepare.read_groups(config, chat, task)
        assert len(validation) == len(Path(name).read_text().splitlines()) and not validation.group(0).columns
        assert train.group(0).columns and not {"reference", "meta.tests"} & validation.audit.unread.keys()
        sets = audit_command.read_sets(config, chat, task, as_run=False)
        assert len(sets["validation"]) == len(validation)


def test_a_column_that_is_not_there_is_an_error_before_anything_is_read(tmp_path, referring):
    """Of the second source, too; where single rows lack it, they are counted."""
    good, bad = referring_rows(tmp_path / "good.jsonl"), tmp_path / "bad.jsonl"
    referring_rows(bad, of=lambda row: {**refer(row), "reference": None, "references": "x"})
    config = make_config(**{"objective.reward": referring, "data.train": f"{good},{bad}"})
    said = (
        rf"{bad}: the column 'reference' is missing or null in its first 24 rows; found prompt, response, score, "
        r"reference, meta, references; did you mean 'references'\?; config\.objective\.reward='test_refers' reads "
        r"reference, meta\.tests "
    )
    with pytest.raises(ValueError, match=said):
        training.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    config.data.columns = "reference=references"  # which the first source needs not
    task = objectives.make(config.objective).task
    prepare.check_columns(config, task)

    some = referring_rows(
        tmp_path / "some.jsonl", of=lambda row: {**refer(row), "meta": {}} if "9" in str(row) else row
    )
    rows = [refer(row) for row in synthetic.rows("ratings", n=24)]
    rows[5]["reference"], rows[6]["meta"] = None, {"url": "x"}
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    some = str(tmp_path / "some.jsonl")
    config = make_config(**{"objective.reward": referring, "data.train": some, "data.max_bad_fraction": 0.2})
    config.data.workers, config.data.cache_dir = 0, str(tmp_path / "cache")
    prepare.check_columns(config, task)
    groups = prepare.build_groups(config, prepare.open_chat(config, tmp_path), task, some)
    assert len(groups) == 22 and groups.audit.reasons["no_column"].rows == 2
    assert groups.audit.reasons["no_column"].example == "some.jsonl:5: there is no reference"


def test_without_columns_the_cache_is_the_one_it_was(tmp_path, referring):
    """A reward that reads none has the cache of `exact`; one that does has its own, and its validation set another."""
    source, chat = referring_rows(tmp_path / "rows.jsonl"), prepare.open_chat(make_config(), tmp_path)
    tasks = [objectives.make(make_config(**{"objective.reward": name}).objective).task for name in ("", "exact")]
    tasks.append(objectives.make(make_config(**{"objective.reward": referring}).objective).task)
    keys = {"cache_dir": tmp_path / "cache", "workers": 0}
    first, second, carries = (
        token_cache.build(source, chat, task, columns="ignore=reference" * (i < 2), **keys)
        for i, task in enumerate(tasks)
    )
    assert repr(tasks[0]) == repr(tasks[2]) and "columns" not in repr(tasks[2])
    assert first.fingerprint == second.fingerprint != carries.fingerprint and not first.group(0).columns
    measured = prepare.without_columns(tasks[2])
    beside = token_cache.build(source, chat, measured, carried=tasks[2].columns, **keys)
    assert beside.fingerprint != carries.fingerprint and len(beside) == len(carries)


@pytest.mark.parametrize("cell", [b"image", {"a": [b"x"]}, 1j])
def test_a_cell_that_is_no_text_is_not_carried(cell):
    with pytest.raises(BadRow, match="wrong_type: reference is "):
        columns.carried({"reference": cell}, ("reference",))


def test_a_run_is_opened_without_the_reward_of_its_own():
    """Its config's file, which registered it, is not read then."""
    objective = objectives.make({**make_config().objective.to_dict(), "reward": "test_gone"})
    assert objective.exported.task.target == "score"
    with pytest.raises(ValueError, match=r"config\.objective\.reward='test_gone' is none of better"):
        objective.task  # noqa: B018


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

"""Rows of every format are scored as training reads them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from format_rows import NAMED, ROWS, assistant, user

from rmjax.batches.chat import Chat
from rmjax.data import formats, sources, store
from rmjax.score import __main__ as score
from rmjax.score import rows

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
ALL = {name: row for name, row in {**ROWS, **NAMED}.items() if name != "prompt_only"}
TAKEN = ("score", "scores", "chosen_score", "rejected_score")  # columns of the output


def write(path, given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def training_reads(name, row, **more):
    """The conversations of a row, and its tools, by training's reader."""
    records = formats.detect([row], name).read(row, source="s", where="w", **more)
    return [list(c) for record in records for c in record.conversations], records[0].tools


def scored(model_dir, source, output, **more):
    score.run(str(model_dir), str(source), output, **more)
    return read(output)


def read(path):
    return list(map(json.loads, path.read_text().splitlines()))


def scores_of(row):
    if "chosen_score" in row:
        return [row["chosen_score"], row["rejected_score"]]
    return row["scores"] if isinstance(row.get("scores"), list) else [row["score"]]


def test_a_benchmark_with_scores_of_its_own_is_refused(model_dir, loaded, fast, tmp_path):
    """`ppe_correctness` needs a column that the output has, too; it is a benchmark, and no file to be scored."""
    source = write(tmp_path / "in.jsonl", [ALL["ppe_correctness"]])
    with pytest.raises(ValueError, match="has a column `scores` already; rename it"):
        scored(model_dir, source, tmp_path / "out.jsonl", format="ppe_correctness")


@pytest.mark.parametrize("name", [name for name in ALL if name != "ppe_correctness"])
def test_a_format_is_scored_as_training_reads_it(name, model_dir, loaded, fast, tokenizer, tmp_path, monkeypatch):
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    monkeypatch.setattr(loaded, "chat", Chat(tokenizer))
    more = {"tools": TOOLS, "system": "Be brief."} if name not in ("label_studio", "records") else {}
    more.pop("system" if name == "unieval" else "", None)  # whose prompt is another column, and all of it
    given = {c: cell for c, cell in ALL[name].items() if c != "scores" or name == "unieval"} | more
    labelled = ALL[name] | more
    format = name if name in NAMED else "auto"
    (row,) = scored(model_dir, write(tmp_path / "in.jsonl", [given]), tmp_path / "out.jsonl", format=format)
    conversations, tools = training_reads(format, labelled)
    assert bool(tools) == bool(more)
    expected = loaded.score(conversations, tools=[tools] * len(conversations))
    np.testing.assert_allclose(scores_of(row), expected, atol=1e-5)
    assert {c: cell for c, cell in row.items() if c not in TAKEN or c in given} == given


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_records_that_convert_writes_are_scored(ending, model_dir, loaded, fast, tmp_path):
    names = ("pair_transcript", "scored_text", "boolean", "ranked", "prm800k", "records", "comparisons")
    for name in names:
        records = formats.detect([ROWS[name]]).read(ROWS[name], source="s", where="w")
        source, output = tmp_path / f"{name}.parquet", tmp_path / f"{name}-out.{ending}"
        store.write(source, records)
        score.run(str(model_dir), str(source), output)
        made, given = ([row for _, row in sources.open_source(str(path))] for path in (output, source))
        expected = loaded.score([c for record in records for c in record.conversations])
        np.testing.assert_allclose(made[0]["scores"], expected, atol=1e-5)
        assert [row["conversations"] for row in made] == [row["conversations"] for row in given]


def test_what_the_template_does_not_show_is_counted(model_dir, loaded, fast, tmp_path):
    rendered = {"messages": [user("<|im_start|>user\nq<|im_end|>"), assistant("a")]}
    given = [{**ROWS["boolean"], "tools": TOOLS}, ROWS["boolean"], rendered]
    told = score.run(str(model_dir), str(write(tmp_path / "in.jsonl", given)), tmp_path / "out.jsonl")[1]
    assert told["tools_left_out"] == told["special_tokens_in_text"] == 1
    first, second, _ = read(tmp_path / "out.jsonl")
    assert first["score"] == pytest.approx(second["score"], abs=1e-5)


MARKS = "<extra_id_1>Assistant\nb\n<extra_id_1>User\n"
WITHOUT_LABEL = {
    "marks": ({"prompt": f"a\n{MARKS}q", "response": "yes"}, "scored_text"),
    "marks of several": ({"prompt": f"a\n{MARKS}q", "responses": ["x", "y"]}, "ranked"),
    "a prompt of messages": ({"prompt": [user("a"), assistant("b"), user("q")], "response": "yes"}, "scored_text"),
    "names of others": ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "messages"),
    "system": ({"system": "be kind", "messages": [user("q"), assistant("a")]}, "messages"),
    "steps": ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, "stepwise"),
    "messages and an answer": ({"messages": [user("q")], "response": "a"}, "scored_text"),
    "two": ({"prompt": "q", "response_a": "x", "response_b": "y"}, "unlabelled_pair"),
    "completion": ({"prompt": "q", "completion": [assistant("a")]}, "messages_completion"),
    "a label of no use": ({"prompt": "q", "chosen": "x", "rejected": "y", "margin": -1, "weight": "high"}, "pair_text"),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_LABEL)
def test_rows_without_a_label_are_read_as_those_with_one(name, model_dir, loaded, fast, tmp_path):
    given, format = WITHOUT_LABEL[name]
    (row,) = scored(model_dir, write(tmp_path / "in.jsonl", [given]), tmp_path / "out.jsonl")
    label = {"ranked": {"scores": [1, 2]}, "scored_text": {"score": 1}}.get(format, {})
    good = {c: cell for c, cell in given.items() if c not in ("margin", "weight")} | label
    np.testing.assert_allclose(scores_of(row), loaded.score(training_reads(format, good)[0]), atol=1e-5)
    assert {c: row[c] for c in given} == given


def test_transcripts_are_scored_as_convert_writes_them(model_dir, loaded, fast, tmp_path):
    talk = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2?\n\nAssistant:"
    source = write(tmp_path / "in.jsonl", [{"prompt": talk, "chosen": " 4", "rejected": " 5"}])
    (row,) = scored(model_dir, source, tmp_path / "out.jsonl")
    turns = [user("hi"), assistant("hello"), user("2+2?")]
    expected = loaded.score([[*turns, assistant("4")], [*turns, assistant("5")]])
    np.testing.assert_allclose(scores_of(row), expected, atol=1e-5)


def test_files_of_several_formats_are_scored_if_their_columns_are_the_same(model_dir, loaded, fast, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", [ROWS["pair_text"]])
    talks = write(tmp_path / "talks.jsonl", [ROWS["pair_messages"]])
    made = scored(model_dir, f"{pairs}, {talks}", tmp_path / "out.jsonl")
    conversations = [c for n in ("pair_text", "pair_messages") for c in training_reads(n, ROWS[n])[0]]
    np.testing.assert_allclose([x for row in made for x in scores_of(row)], loaded.score(conversations), atol=1e-5)
    one = write(tmp_path / "one.jsonl", [ROWS["boolean"]])
    with pytest.raises(
        ValueError, match=r"one\.jsonl:0 is messages, and the first row pair_text, which gets other columns"
    ):
        score.run(str(model_dir), f"{pairs}, {one}", tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "completions": ["a", "b"]}, "Closest is stepwise, which needs 'labels'"),  # steps, or several
        ({"prompt": "q", "response": None}, "column 'response' is null throughout"),
    ],
)
def test_rows_that_could_be_something_else_are_refused(row, words, model_dir, tmp_path):
    with pytest.raises(ValueError, match=words):
        score.run(str(model_dir), str(write(tmp_path / "in.jsonl", [row])), tmp_path / "out.jsonl")


def test_a_format_that_is_named_is_checked(model_dir, fast, tmp_path):
    source = write(tmp_path / "in.jsonl", [ROWS["pair_text"]])
    with pytest.raises(ValueError, match="'chosen' is wrong throughout"):
        score.run(str(model_dir), str(source), tmp_path / "out.jsonl", format="pair_messages")
    with pytest.raises(ValueError, match="unknown data format 'pears'"):
        score.run(str(model_dir), str(source), tmp_path / "out.jsonl", format="pears")


class Judge:
    """Compares two responses by their length; or scores the steps of one by theirs."""

    def __init__(self, work):
        self.inference = work
        self.chat = SimpleNamespace(left_out=lambda conversation, tools: [])

    def judge(self, first, second):
        longer = [len(a[-1]["content"]) > len(b[-1]["content"]) for a, b in zip(first, second, strict=True)]
        return [{"A": float(x), "B": float(not x)} for x in longer]

    def steps_at(self, conversations, stops, tools=None):
        texts = [[c[-1]["content"][:stop] for stop in ends] for c, ends in zip(conversations, stops, strict=True)]
        return [[float(len(text)) for text in of_one] for of_one in texts]


@pytest.fixture
def other_kind(monkeypatch, loaded):
    """The command finds a model of another kind."""

    def use(kind):
        monkeypatch.setattr("rmjax.score.survey.kind_of", lambda *_: kind)
        judge = Judge(loaded.inference)
        monkeypatch.setattr("rmjax.inference.reward_model.load_checked", lambda *_args, **_kwargs: judge)

    return use


@pytest.mark.parametrize("name", ["unlabelled_pair", "pair_text", "pair_messages", "judged_pair", "strength_pair"])
def test_a_judge_compares_the_two_responses_of_any_format(name, model_dir, other_kind, tmp_path):
    other_kind(rows.JUDGING)
    (row,) = scored(model_dir, write(tmp_path / "in.jsonl", [ALL[name]]), tmp_path / "out.jsonl")
    first, second = (c[-1]["content"] for c in training_reads(name, ALL[name])[0])
    assert (row["A"], row["B"]) == (float(len(first) > len(second)), float(len(first) <= len(second)))
    with pytest.raises(ValueError, match=r"in\.jsonl:0: it has 4 responses; a judge of pairs compares two"):
        scored(model_dir, write(tmp_path / "in.jsonl", [ROWS["comparisons"]]), tmp_path / "out.jsonl")


@pytest.mark.parametrize("name", ["stepwise", "stepwise_text", "shepherd_text", "prm800k", "unlabelled_steps"])
def test_steps_of_any_format_are_scored(name, model_dir, other_kind, tmp_path):
    other_kind(rows.STEPWISE)
    (row,) = scored(model_dir, write(tmp_path / "in.jsonl", [ALL[name]]), tmp_path / "out.jsonl")
    records = formats.detect([ALL[name]], name).read(ALL[name], source="s", where="w")
    stops = [[step.stop for step in of_one] for record in records for of_one in record.steps]
    assert row["scores"] == (stops if name == "prm800k" else stops[0])
    with pytest.raises(ValueError, match=r"in\.jsonl:0: it has no steps; the model scores steps"):
        scored(model_dir, write(tmp_path / "in.jsonl", [ROWS["pair_text"]]), tmp_path / "out.jsonl")

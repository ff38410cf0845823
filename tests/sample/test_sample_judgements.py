"""Judgements of labelled rows: what is asked, what a row has, and which rows are not asked about."""

import json

import pyarrow.parquet as pq
import pytest
import tiny_models
import transformers
from planted_judge import Planted

from rmjax.inference import generation
from rmjax.judging import verdicts
from rmjax.sample import __main__ as sample
from rmjax.sample import judging
from rmjax.sample.judging import Options

PAIR = {"prompt": "q1", "chosen": "long", "rejected": "short"}
RATED = {"prompt": "q", "responses": ["good", "bad", "odd"], "scores": [4, 1, None]}
DRAWN = {"responses": 3, "max_tokens": 50}


@pytest.fixture
def judged(monkeypatch, tokenizer_dir, tmp_path):
    """Samples judgements of rows with a planted judge: what is written, and the counts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))

    def run(judge, rows, options, *, name="out.jsonl", opened="", **more):
        class Model(Planted):
            def prompts(self, conversations, tools, rows):
                prompts = super().prompts(conversations, tools, rows)
                ids = self.chat.encode([opened])[0] if opened else []
                return [prompt._replace(tokens=[*prompt.tokens, *ids]) for prompt in prompts]

            def write(self, sampler, prompts, stop):
                numbers.extend(prompt.row for prompt in prompts)
                return super().write(sampler, prompts)

        numbers: list[int] = []
        monkeypatch.setattr(generation, "open_model", lambda *_, **__: Model(tokenizer, judge, over_long="endless"))
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        read, counts = sample.run(str(tmp_path), str(source), tmp_path / name, judge=options, **DRAWN, **more)
        assert read == len(rows) and len(set(numbers)) == len(numbers)
        return tmp_path / name, counts

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_length(text, k):
    """The first judgement is always A, the second finds the long one, the third cannot be read."""
    found = "A" if text.find("long") < text.find("short") else "B"
    return ["<better>A</better>", f"<better>{found}</better>", "cut <better>"][k]


def test_a_pair_is_asked_about_in_in_both_orders(judged):
    path, counts = judged(by_length, [PAIR, {"prompt": "q4", "chosen": "short", "rejected": "long"}], Options("pair"))
    made = lines(path)
    assert [row["label"] for row in made] == ["A", "B", "A", "B"]
    assert [row["verdicts"] for row in made] == [["A", "A", None], ["A", "B", None], ["A", "B", None], ["A", "A", None]]
    template = verdicts.load_template("", "judge_pair")
    history = [{"role": "user", "content": "q1"}]
    for row, shown in zip(made, (["long", "short"], ["short", "long"])):
        assert row["messages"] == [verdicts.ask(template, "pair", history, shown, ties=True)]
    assert set(made[0]) == {"messages", "label", "responses", "verdicts", "finish", "response_tokens"}
    assert made[0]["finish"] == ["stop"] * 3 and made[0]["responses"][0] == "<better>A</better>"
    assert counts["questions"] == 4 and counts["unreadable"] == 4 and counts["responses"] == 12


def test_rows_without_a_label_are_counted_and_named(judged, capsys):
    rows = [PAIR, {"prompt": "q", "chosen": "a", "rejected": "a"}]
    path, counts = judged(by_length, rows, Options("pair"))
    told = capsys.readouterr().out
    assert len(lines(path)) == counts["questions"] == 2
    assert "data: 2 rows, 1 groups" in told and "identical_responses 1" in told and "in.jsonl:1" in told
    ranked = [{"prompt": "q", "responses": ["long", "short", "middle"], "scores": [1, 1, 1]}]
    path, _ = judged(by_length, [*ranked, {**RATED, "responses": ["a", "b", "c"]}], Options("pair", ties=False))
    told = capsys.readouterr().out
    assert "tie 1" in told and "in.jsonl:0" in told and len(lines(path)) == 2
    with pytest.raises(ValueError, match=r"no row has a label that can be judged; tie 1"):
        judged(by_length, ranked, Options("pair", ties=False))


def test_each_rated_response_is_asked_about(judged, capsys):
    rate = lambda text, k: f"<score>{4 if 'good' in text else k}</score>"
    options = Options("score", attribute="score", scale=(0.0, 4.0))
    path, _ = judged(rate, [RATED], options)
    made = lines(path)
    assert [(row["label"], row["verdicts"]) for row in made] == [(4.0, [4.0, 4.0, 4.0]), (1.0, [0.0, 1.0, 2.0])]
    assert "no_label 1 (1 kept)" in capsys.readouterr().out  # the response without a rating
    whole, _ = judged(rate, [RATED], options, name="out.parquet")
    assert pq.read_table(whole).to_pylist() == made


def test_a_thought_that_the_template_opened_stands_before_the_answer(judged):
    """Nothing is read within it, and what is kept is all that the model has to write and to read."""
    texts = [
        "so <better>A</better>",
        "hm</think>\n<better>A</better>",
        "hm <better>B</better></think><better>A</better>",
    ]
    path, _ = judged(lambda text, k: texts[k], [PAIR], Options("pair"), opened="<think>\n")
    row = lines(path)[0]
    assert row["verdicts"] == [None, "A", "A"] and row["responses"] == ["<think>\n" + text for text in texts]


def test_a_question_that_there_is_no_room_for_has_no_judgements(judged):
    rows = [PAIR, {"prompt": "endless", "chosen": "long", "rejected": "short"}]
    path, counts = judged(by_length, rows, Options("pair"))
    assert [len(row["verdicts"]) for row in lines(path)] == [3, 3, 0, 0] and counts["prompt too long"] == 2


def test_another_question_is_another_job(judged, monkeypatch):
    real = sample._sampled
    monkeypatch.setattr(sample, "_sampled", lambda *_: (_ for _ in ()).throw(MemoryError("killed")))
    monkeypatch.setattr(sample.jobs.Job, "has_parts", lambda self: True)
    with pytest.raises(MemoryError):
        judged(by_length, [PAIR], Options("pair"))
    monkeypatch.setattr(sample, "_sampled", real)
    with pytest.raises(ValueError, match="judge ties is false, was true"):
        judged(by_length, [PAIR], Options("pair", ties=False))
    assert len(lines(judged(by_length, [PAIR], Options("pair"))[0])) == 2


def test_a_judge_asks_its_own_question(monkeypatch, tmp_path):
    terms = {"objective": {"name": "sft", "target": "score", "template": "{{ response }}", "scale": [0, 2]}}
    monkeypatch.setattr(judging.contract, "find", lambda model: terms if model == "judge" else None)
    task = judging.task_of("judge", Options())
    assert (task.target, task.template, task.scale) == ("score", "{{ response }}", (0, 2))
    assert judging.task_of("judge", Options("score")) == task
    for options, words in ((Options("pair"), "--judge=pair asks"), (Options("score", scale=(1, 5)), "--scale asks")):
        with pytest.raises(ValueError, match=words):
            judging.task_of("judge", options)
    (tmp_path / "question.jinja").write_text("{{ response_a }} or {{ response_b }}?")
    task = judging.task_of("other", Options("pair", template=str(tmp_path / "question.jinja"), ties=False))
    assert (task.template, task.ties) == ("{{ response_a }} or {{ response_b }}?", False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(), "give --judge=pair or --judge=score"),
        (Options("pair", scale=(1, 5)), "--scale does nothing with --judge=pair"),
        (Options("score", ties=False), "--no_ties does nothing with --judge=score"),
        (Options("score", scale=(5, 1)), r"--scale=\(5, 1\) must be"),
        (Options("pair", template="gone.jinja"), "--template: there is no judging template gone.jinja"),
    ],
)
def test_unsuitable_options_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        judging.task_of(str(tmp_path), options)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scale=1,5"], "--scale is of the judge's question"),
        (["--judge=both"], "'both' is none of pair, score"),
        (["--judge=score", "--scale=3"], "--scale=3 is not two numbers"),
        (["--judge=pair", "--stop=x"], "leave it out with --judge"),
        (["--judge"], "give --judge=pair or --judge=score"),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(json.dumps(PAIR) + "\n")
    tiny_models.make_hf_model("qwen2", tmp_path, head=False, num_hidden_layers=1)
    given = [f"--model={tmp_path}", f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    with pytest.raises(SystemExit) as error:
        sample.main([*given, *flags])
    assert error.value.code == 2 and words in capsys.readouterr().err

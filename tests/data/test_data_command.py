"""`python -m rmjax.data`: the real commands on generated rows and on small sets in the shape of public ones."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers
from format_rows import user
from small_sets import SETS, judge_bench

from rmjax.data import agreement, prompts, reading, sources
from rmjax.data.__main__ import main
from rmjax.data.synthetic import FILLER
from rmjax.runtime import progress
from rmjax.runtime.files import SCRATCH

PAIRS = "synthetic://pairs?n=200"


def run(*arguments, rc=0):
    """The command in a process of its own; returns what it printed and said."""
    done = subprocess.run([sys.executable, "-m", "rmjax.data", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == rc, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def call(capsys):
    """The command in this process."""

    def call(*arguments, rc=0):
        if rc:
            with pytest.raises(SystemExit) as stopped:
                main([str(x) for x in arguments])
            assert stopped.value.code == rc
        else:
            main([str(x) for x in arguments])
        return capsys.readouterr()

    return call


def same(first, second):
    """Records are equal but for where they stood."""
    assert first.conversations == second.conversations and (first.tools, first.source) == (second.tools, second.source)
    for name in ("wins", "ties", "margin"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    np.testing.assert_equal(
        [dict(first.attributes), first.agreement, first.weight],
        [dict(second.attributes), second.agreement, second.weight],
    )
    assert first.steps == second.steps


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ----------------------------------------------------------------------------------------------------
# inspect
# ----------------------------------------------------------------------------------------------------


def test_help_and_inspect_as_users_run_them(tmp_path):
    said, _ = run("--help")
    assert all(name in said for name in ("inspect", "convert", "split", "audit"))
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "margin": 2.5}] * 3)
    said, _ = run("inspect", path, "--show=1")
    assert "margin    number, 2.5 to 2.5" in said and "format: pair_text" in said
    assert "user      | 2 + 2?" in said and "response 1 of 2: better than 2 by 2.5\n    assistant | 4" in said
    assert "data: 3 rows, 3 groups (pairs 3)" in said
    assert "validation data of 1 prompt cannot show an accuracy of at least 70 %" in said and "takes 11" in said


def test_inspect_shows_the_scored_token_of_the_rendering(call, tmp_path, tokenizer_dir):
    path = write(tmp_path / "p.jsonl", [{"prompt": "hi", "chosen": "hello", "rejected": "no"}])
    shown = call("inspect", path, f"--tokenizer={tokenizer_dir}").out
    assert shown.count("⟦\\n⟧") == 2  # the newline after the end of the turn, which transformers pools
    assert "    | <|im_start|>assistant\n    | hello<|im_end|>⟦\\n⟧\n" in shown


def test_inspect_marks_every_step(call, tmp_path, tokenizer_dir):
    row = {"prompt": "1 + 1 + 1?", "completions": ["1 + 1 is 2.", "2 + 1 is 4."], "labels": [True, False]}
    shown = call("inspect", write(tmp_path / "s.jsonl", [row]), f"--tokenizer={tokenizer_dir}").out
    assert "response 1 of 1: steps 1 0" in shown and shown.count("⟦") == 3  # one of them in the heading


@pytest.mark.parametrize(
    ("name", "form", "says"),
    [
        ("votes.json", "annotated_pair", ["response2       text or true/false", "empty_response 6"]),
        ("trees.jsonl", "ranked_tree", ["10 rows, 18 groups"]),
        ("comparisons.json.gz", "comparisons", ["24 rows, 24 groups", "response 4 of 4"]),
        ("attributes.jsonl", "nemo_text", ["helpfulness 4", "quality missing"]),
    ],
)
def test_inspect_of_a_set(call, small_sets, name, form, says):
    shown = call("inspect", small_sets / name).out
    assert f"format: {form}\n" in shown and all(text in shown for text in says)


def test_inspect_of_an_unknown_format_shows_the_columns_and_the_closest(call, tmp_path):
    path = write(tmp_path / "odd.jsonl", [{"question": "q", "chosen": "a", "rejectd": "b"}])
    shown = call("inspect", path, rc=2)
    assert "question  text" in shown.out and 'rejectd = "b"' in shown.out
    assert shown.err.startswith(f"error: {path}: unknown data format") and "did you mean 'rejectd'?" in shown.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspct", "x"], "did you mean 'inspect'?"),
        (["inspect", "x", "--shw=3"], "did you mean --show?"),
        (["inspect", "x", "--format=pair_txt"], "did you mean 'pair_text'?"),
        (["split", "x", "--output=y"], "required: --split"),
        (["split", "x", "--output=y", "--split=train=0.8"], "add up to 0.8, expected 1"),
        (["audit"], "needs a SOURCE"),
        (["inspect", "there_is_none.jsonl"], "no such file"),
        (["audit", PAIRS, "--objective=bradley_tery"], "did you mean 'bradley_terry'?"),
        (["audit", PAIRS, "--config.plan.row_token=5"], "did you mean --config.plan.row_tokens?"),
        (["audit", "--config=there_is_none.py"], "there is no config file"),
    ],
)
def test_mistakes_are_one_line(call, arguments, says):
    error = call(*arguments, rc=2).err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------
# convert and split
# ----------------------------------------------------------------------------------------------------


def test_convert_reads_back_equal(tmp_path):
    said, _ = run("convert", PAIRS, f"--output={tmp_path / 'pairs.parquet'}")
    assert "empty_response 1" in said and "197 records in" in said
    before, after = (list(reading.records(str(x))) for x in (PAIRS, tmp_path / "pairs.parquet"))
    assert len(before) == len(after) == 197
    for first, second in zip(before, after):
        same(first, second)


@pytest.mark.parametrize(
    "name",
    ["votes.json", "trees.jsonl", "comparisons.json.gz", "talk_axes.json", "attributes.jsonl", "booleans.json"],
)
def test_a_set_reads_back_equal(call, small_sets, tmp_path, name):
    call("convert", small_sets / name, f"--output={tmp_path}/new/")
    before, after = (list(reading.records(str(x))) for x in (small_sets / name, tmp_path / "new"))
    assert len(before) == len(after) > 0
    for first, second in zip(before, after):
        same(first, second)


def test_split_keeps_prompts_on_one_side_and_every_record(call, small_sets, tmp_path):
    source = small_sets / "votes.json"
    arguments = ["split", source, "--split=train=0.7,validation=0.2,test=0.1"]
    shown = call(*arguments, f"--output={tmp_path}/a", "--seed=1").out
    assert "votes / tie" in shown and "votes / preference" in shown
    parts = {name: list(reading.records(f"{tmp_path}/a/{name}.parquet")) for name in ("train", "validation", "test")}
    asked = [{h for record in part for h in prompts.histories(record)} for part in parts.values()]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
    assert sorted(repr(r.conversations) for part in parts.values() for r in part) == sorted(
        repr(r.conversations) for r in reading.records(str(source))
    )
    # A prompt has five rows.
    assert [abs(len(part) - share * 110) < 5 for part, share in zip(parts.values(), (0.7, 0.2, 0.1))] == [True] * 3
    call(*arguments, f"--output={tmp_path}/b", "--seed=1")
    call(*arguments, f"--output={tmp_path}/c", "--seed=2")
    read = lambda name: pq.read_table(tmp_path / name / "test.parquet")
    assert read("a").equals(read("b")) and not read("a").equals(read("c"))


def test_split_by_a_prompt_that_differs_in_case_spacing_and_system(call, tmp_path):
    turns = lambda system, text: [{"role": "system", "content": system}, {"role": "user", "content": text}]
    rows = [
        {"prompt": turns(f"be {i}", f"Question {i // 2}?" if i % 2 else f" question  {i // 2}?"),
         "chosen": [{"role": "assistant", "content": f"yes {i}"}], "rejected": [{"role": "assistant", "content": "no"}]}
        for i in range(40)
    ]  # fmt: skip
    call("split", write(tmp_path / "rows.jsonl", rows), f"--output={tmp_path}/s", "--split=a=0.5,b=0.5")
    for name in "ab":
        numbers = [int(r.row.rpartition(":")[2]) for r in reading.records(f"{tmp_path}/s/{name}.parquet")]
        assert len(numbers) == 20


def test_rows_without_prompts_are_split_too(call, tmp_path):
    rows = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(50)]
    call("split", write(tmp_path / "plain.jsonl", rows), f"--output={tmp_path}/s", "--split=a=0.9,b=0.1")
    assert sources.count_rows(f"{tmp_path}/s/b.parquet") == 5


def test_nothing_else_is_overwritten_and_a_failure_leaves_nothing(call, tmp_path):
    mine = tmp_path / "mine.parquet"
    mine.write_text("a novel")
    assert "was not written by this" in call("convert", PAIRS, f"--output={mine}", rc=2).err
    assert mine.read_text() == "a novel"
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "other.jsonl").write_text("{}")
    assert "holds other.jsonl" in call("convert", PAIRS, f"--output={tmp_path}/d", rc=2).err
    assert (
        "a split needs a directory"
        in call("split", PAIRS, f"--output={tmp_path}/x.parquet", "--split=a=0.5,b=0.5", rc=2).err
    )
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "q", "chosen": "", "rejected": "no"}])
    assert "none of its 1 rows could be used" in call("convert", bad, f"--output={tmp_path}/y.parquet", rc=2).err
    two = write(tmp_path / "two.jsonl", [{"prompt": "q", "chosen": "a", "rejected": x} for x in "bc"])
    assert (
        "1 prompts leave nothing for b" in call("split", two, f"--output={tmp_path}/z", "--split=a=0.5,b=0.5", rc=2).err
    )
    assert sorted(path.name for path in tmp_path.rglob("*.parquet")) == ["mine.parquet"]
    # What it wrote itself, it writes again.
    for _ in range(2):
        call("convert", PAIRS, f"--output={tmp_path}/again.parquet")
    assert (
        "would be written into the source"
        in call("convert", f"{tmp_path}/again.parquet", f"--output={tmp_path}/again.parquet", rc=2).err
    )


def test_whose_a_file_is_is_told_by_its_contents(call, tmp_path):
    """Not by its name, nor by a word in its metadata; and a link is not followed, nor replaced."""
    out = tmp_path / "out" / "records.parquet"
    call("convert", PAIRS, f"--output={out}")
    ours = out.read_bytes()
    table = pq.read_table(out)
    for other in (
        table.replace_schema_metadata({"rmjax": "table of another program"}),
        table.replace_schema_metadata(),
    ):
        pq.write_table(other, out)
        before = out.read_bytes()
        assert "was not written by this" in call("convert", PAIRS, f"--output={out.parent}", rc=2).err
        assert out.read_bytes() == before
    target = tmp_path / "target.parquet"
    for there in (True, False):
        target.write_bytes(ours) if there else target.unlink()
        out.unlink()
        out.symlink_to(target)
        assert "is a link to" in call("convert", PAIRS, f"--output={out.parent}", rc=2).err
        assert out.is_symlink() and target.exists() == there


SPLIT = ["split", PAIRS, "--split=a=0.5,b=0.3,c=0.2"]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.parquet")}


def failing(monkeypatch, number, stop):
    """The n-th file that gets a name, of a split's or of those that it replaces, does not."""
    real, calls = Path.replace, [0]

    def replace(self, target):
        if SCRATCH in f"{self.name} {Path(target).name}":
            calls[0] += 1
            if calls[0] == number:
                stop()
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    return calls


@pytest.mark.parametrize("again", [False, True])
def test_parts_of_a_split_come_together_or_not_at_all(again, call, tmp_path, monkeypatch):
    def stop():
        raise PermissionError(13, "not here")

    for number in range(1, 20):
        out = tmp_path / str(number)
        if again:
            call(*SPLIT, f"--output={out}", "--seed=1")
        before = contents(out)
        with monkeypatch.context() as patch:
            calls = failing(patch, number, stop)
            with contextlib.suppress(SystemExit):
                main([*SPLIT, f"--output={out}", "--seed=2"])
        if calls[0] < number:
            break
        assert contents(out) == before and not [path for path in tmp_path.rglob(".convert*") if path.exists()]
    assert number > 3 + 3 * again
    assert len(contents(out)) == 3 and contents(out) != before


def test_a_split_that_is_killed_leaves_no_parts_of_two(call, tmp_path, monkeypatch):
    """Parts of two splits have prompts on both sides. What is left of the kill is not read as data."""
    for seed in (1, 2):
        call(*SPLIT, f"--output={tmp_path}/whole-{seed}", f"--seed={seed}")
    whole = [contents(tmp_path / f"whole-{seed}") for seed in (1, 2)]
    for number in range(2, 8):
        out = tmp_path / str(number)
        call(*SPLIT, f"--output={out}", "--seed=1")
        child = os.fork()
        if not child:
            failing(monkeypatch, number, lambda: os._exit(9))
            main([*SPLIT, f"--output={out}", "--seed=2"])
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        left = contents(out)
        assert any(left.items() <= parts.items() for parts in whole), left.keys()
        if left:
            assert {str(path.parent) for path in sources.local_files(str(out))} == {str(out)}
        call(*SPLIT, f"--output={out}", "--seed=2")
        assert contents(out) == whole[1]


def test_bad_rows_stop_or_are_kept(call, tmp_path):
    bad = write(tmp_path / "b.jsonl", [{"prompt": "q", "chosen": x, "rejected": "no"} for x in ("yes", "", 3)])
    assert "b.jsonl:1" in call("convert", bad, f"--output={tmp_path}/e.parquet", "--on_bad_row=error", rc=2).err
    assert not (tmp_path / "e.parquet").exists()
    shown = call("convert", bad, f"--output={tmp_path}/k.parquet", "--on_bad_row=keep").out
    assert "empty_response 1 (1 kept)" in shown and "wrong_type 1" in shown and "2 records in" in shown


def test_progress_tells_the_time_left(call, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr(reading, "SHOWN_ROWS", 50)
    said = call("convert", PAIRS, f"--output={tmp_path}/p.parquet").err
    assert "50/200" in said and " left  " in said and "rows/s" in said


# ----------------------------------------------------------------------------------------------------
# audit
# ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_audit_as_users_run_it(tmp_path):
    page = tmp_path / "pages" / "audit.html"
    said, _ = run("audit", PAIRS, f"--html={page}")
    assert re.search(r"data +200 +\d +197 ", said) and "Comparisons: preferred 193, tie 4" in said
    assert "lengths are in bytes" in said and page.stat().st_size > 10_000


def test_audit_json_finds_shared_prompts_and_the_benchmarks(call, tmp_path, tokenizer_dir):
    row = lambda prompt, i: {"prompt": prompt, "chosen": f"yes {i}", "rejected": f"no {i}"}
    train = write(tmp_path / "t.jsonl", [row(f"Question {i}?", i) for i in range(20)] + [row("Question 1?", 1)])
    validation = write(tmp_path / "v.jsonl", [row(f"Question {i}?", 99) for i in range(18, 24)])
    bench = write(tmp_path / "b.jsonl", [row(f"question  {i}?", 7) for i in (3, 4, 50)])
    clean = write(tmp_path / "c.jsonl", [row("Something else", 7)])
    shown = call(
        *("audit", train, f"--validation={validation}", f"--benchmark={bench}", f"--benchmark={clean}", "--json"),
        *(f"--tokenizer={tokenizer_dir}", "--config.plan.row_tokens=64"),
    )
    found = json.loads(shown.out)
    shared = {name: (x["prompts"], x["of"]) for name, x in found["shared"].items()}
    assert shared == {"validation": (2, 6), str(bench): (2, 3), str(clean): (0, 1)}
    assert ["t.jsonl:3", "b.jsonl:0"] in found["shared"][str(bench)]["examples"]
    assert len(found["problems"]) == 2 and found["unit"] == "tokens"
    assert any(
        "validation data of 6 prompts cannot show an accuracy of at least 70 %" in note for note in found["notes"]
    )
    measured = found["sets"]["training"]
    assert measured["repeated"] == {"groups": 1, "examples": [["t.jsonl:1", "t.jsonl:20"]]}
    assert measured["plan"]["row_tokens"] == 64 and 0.5 < measured["plan"]["fill"] <= 1


@pytest.mark.parametrize("with_tokens", [True, False])
def test_audit_says_what_of_a_benchmark_is_in_the_data(call, tmp_path, tokenizer_dir, with_tokens):
    words = lambda i: " ".join(np.random.default_rng(i).choice(FILLER, 80))
    asked = [f"Question {i}: {words(i)}?" for i in range(9)]
    bench = judge_bench(tmp_path / "b.jsonl", asked)
    row = lambda prompt: {"prompt": prompt, "chosen": "yes", "rejected": "no"}
    train = write(tmp_path / "t.jsonl", [row(asked[2]), row(f"Well. {asked[4]} Please."), row("Something else")])
    tokens = [f"--tokenizer={tokenizer_dir}"] * with_tokens
    found = json.loads(call("audit", train, f"--against=judge_bench={bench}", "--json", *tokens).out)
    assert found["overlap"]["judge_bench"] | {"examples": 0} == {"groups": 2, "of": 9, "by_prompt": 1, "examples": 0}
    assert found["overlap"]["judge_bench"]["examples"][0][0] == "t.jsonl:1"
    (problem,) = [text for text in found["problems"] if "judge_bench" in text]
    assert problem.startswith(
        "judge_bench: 1 of its 9 prompts are in the training data, so its numbers mislead; 1 other"
    )


def test_audit_of_a_config_is_what_the_run_would_see(call, tmp_path):
    shown = call("audit", "--config=configs/bt_tiny.py", "--config.data.train=" + PAIRS, "--json")
    found = json.loads(shown.out)
    assert found["reading"]["training"]["reasons"]["tie"]["rows"] == 4
    assert (found["sets"]["training"]["groups"], found["sets"]["training"]["plan"]["row_tokens"]) == (193, 512)
    assert found["sets"]["validation"]["groups"] > 500 and found["shared"]["validation"]["prompts"] == 0


def usable_votes():
    rows = SETS["votes.json"]
    rows = [row for row in rows if all(x not in ("", True) for x in (row["response1"], row["response2"]))]
    return [[row[f"annotator{i}"] for i in (1, 2, 3)] for row in rows]


def test_audit_says_what_training_would_refuse(call, small_sets):
    shown = call("audit", small_sets / "votes.json").out
    assert "Training would refuse data: 10 of 120 rows (8.3%) cannot be used" in shown
    agreed = [given[0] for given in usable_votes() if len(set(given)) == 1]
    ties = agreed.count(0)
    said = f"preferred {len(agreed) - ties}, soft {110 - len(agreed)}, tie {ties}"
    assert f"Comparisons: {said}" in shown and 10 < ties < 20
    assert "the longer response is preferred in" in shown


def test_audit_counts_the_comparisons_of_rankings(call, small_sets):
    found = json.loads(call("audit", small_sets / "trees.jsonl", "--json").out)
    # Two trees have no order of their three last replies.
    assert found["sets"]["data"]["labels"]["comparisons"]["preferred"] == 8 * (1 + 3) + 2 * 1
    found = json.loads(call("audit", small_sets / "comparisons.json.gz", "--json").out)
    given = [verdict for row in SETS["comparisons.json.gz"] for verdict in row["preference"]]
    counts = found["sets"]["data"]["labels"]["comparisons"]
    assert counts["preferred"] + counts["tie"] == len(given) == 6 * 24 and counts["tie"] == given.count(0)
    assert found["sets"]["data"]["responses"] == {"values": [4], "counts": [24]}


def test_audit_without_labels_is_of_conversations_to_imitate(call, tmp_path, tokenizer_dir):
    """Trained are "a b c<|im_end|>" and no more, as the ChatML around it is not the model's to write."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "tree plant tree"}]
    path = write(tmp_path / "m.jsonl", [{"messages": turns}] * 2)
    found = json.loads(call("audit", path, "--json", f"--tokenizer={tokenizer_dir}").out)["sets"]["data"]
    assert found["labels"]["kind"] == "tokens" and found["repeated"]["groups"] == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    count = lambda text: len(tokenizer(text)["input_ids"])
    share = count("tree plant tree<|im_end|>") / count(tokenizer.apply_chat_template(turns, tokenize=False))
    assert found["labels"]["fields"]["loss_weight"]["share"] == pytest.approx(share)


def test_audit_of_verdicts(call, small_sets):
    found = json.loads(call("audit", small_sets / "votes.json", "--objective=pairwise", "--json").out)
    measured = found["sets"]["data"]
    assert sum(measured["labels"]["comparisons"].values()) == 110 and measured["labels"]["kind"] == "verdicts"
    curve = measured["length"]["curve"]
    untied = sum(given != [0, 0, 0] for given in usable_votes())
    assert measured["length"]["comparisons"] == sum(curve["counts"]) == untied
    assert np.average(curve["mean"], weights=curve["counts"]) == pytest.approx(measured["length"]["auc"], abs=1e-6)


IN_SYSTEM = lambda i: {**user(f"question {i}"), "role": "system"}


@pytest.mark.parametrize(
    "histories",
    [
        lambda i: ([IN_SYSTEM(i)],) * 2,
        lambda i: ([IN_SYSTEM(i), user("Go on.")],) * 2,
        lambda i: ([user("q"), {**user(f"question {i}"), "role": "assistant"}, user("And?")],) * 2,
        lambda i: ([user("Hello")] if i % 2 else [], [user(f"question {i}")]),  # in either of two histories
    ],
)
def test_no_prompt_is_in_two_parts_whatever_holds_it(histories, call, tmp_path):
    rows = []
    for i, other in itertools.product(range(20), range(3)):
        sides = [[*h, {"role": "assistant", "content": f"{word} {other}"}] for h, word in zip(histories(i), ("a", "b"))]
        rows.append(dict(zip(("chosen", "rejected"), sides[:: -1 if other == 1 else 1])))
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call("split", tmp_path / "in.jsonl", "--split=a=0.5,b=0.5", f"--output={tmp_path}/out")
    parts = [[repr(r.conversations) for r in reading.records(f"{tmp_path}/out/{name}.parquet")] for name in "ab"]
    asked = [{words for text in part for words in re.findall(r"question \d+", text)} for part in parts]
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == 20


def test_convert_to_label_studio(call, tmp_path):
    arguments = ("convert", "synthetic://pairs?n=50", "--to=label_studio", f"--output={tmp_path / 'ls'}")
    out, _ = call(*arguments)
    tasks = json.loads((tmp_path / "ls" / "tasks.json").read_text())
    assert f"{len(tasks)} tasks in" in out and 45 < len(tasks) <= 50
    assert all({"prompt", "response_1", "response_2"} <= task["data"].keys() for task in tasks)
    assert "<Choices" in (tmp_path / "ls" / "config.xml").read_text()
    call(*arguments, "--ask=rating", "--attributes=helpful,short", "--scale=0,4")
    assert (tmp_path / "ls" / "config.xml").read_text().count("<Rating") == 4
    assert "is not two whole numbers" in call(*arguments, "--scale=low", rc=2).err


def test_annotators_agreement_is_shown(call, small_sets):
    (found,) = agreement.summaries(str(small_sets / "votes.json"))
    for command in (("inspect", "--show=0"), ("audit",)):
        out, _ = call(command[0], small_sets / "votes.json", *command[1:])
        assert "Fleiss" in out and "Krippendorff" in out and f"{found.alpha:.3f}" in out


def test_inspect_names_the_row_that_is_too_deep(tmp_path, capsys):
    deep = "[" * 900 + "]" * 900
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "q"}}\n{{"prompt": "q", "extra": {deep}}}\n')
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path / "a.jsonl")])
    assert stop.value.code == 2 and "a.jsonl:1: lists or objects are nested too deep" in capsys.readouterr().err

"""The cache of token trees: what goes in comes out, once, whole, and with everything counted."""

import gzip
import io
import itertools
import json
import logging
import multiprocessing.connection
import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmjax.batches import groups as groups_lib
from rmjax.batches import token_cache, token_files
from rmjax.batches.chat import Chat
from rmjax.batches.tasks import Example, Preferences
from rmjax.data import ledger, sources
from rmjax.data.formats import Layout
from rmjax.data.sources import registered
from rmjax.runtime import progress

SPEC = "synthetic://pairs?n=400"


def row(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


@pytest.fixture
def build(tokenizer, tmp_path):
    """Builds in this process, into a fresh directory; rows are written to a file first."""

    def call(source, chat=None, ties="skip", **kwargs):
        if not isinstance(source, str):
            path = tmp_path / "rows.jsonl"
            path.write_text("".join(json.dumps(r) + "\n" for r in source))
            source = str(path)
        arguments = {"workers": 0, "cache_dir": tmp_path / "cache", "max_bad_fraction": 1.0, **kwargs}
        return token_cache.build(source, chat or Chat(tokenizer), Preferences(ties), **arguments)

    return call


GOOD = [
    row(f"question {i % 7}", f"yes {i} " + "word " * (i % 5), f"no {i} " + "word " * (i % 3), margin=i / 4)
    for i in range(30)
]


def test_groups_are_the_trees_and_labels_of_the_records(build, tokenizer):
    groups, chat = build(GOOD), Chat(tokenizer)
    read = Layout("pair_text").read
    records = [read(r, source="rows", where=f"rows.jsonl:{i}")[0] for i, r in enumerate(GOOD)]
    assert len(groups) == len(records)
    for i, (record, (tree, *_)) in enumerate(zip(records, chat.groups([Example(r.conversations) for r in records]))):
        group = groups.group(i)
        for name in ("tokens", "positions", "visible_until", "end", "end_slot"):
            np.testing.assert_array_equal(getattr(group.tree, name), getattr(tree, name))
            assert getattr(group.tree, name).dtype == np.int32
        for name in ("wins", "ties", "margin"):
            np.testing.assert_array_equal(group.labels[name], getattr(record, name))
        assert (group.id, groups.id(i), group.weight) == (record.row, record.row, 1.0)
        alone = [len(tokens) for tokens in tree.sequences()]
        assert (groups.lengths[i], groups.responses[i], groups.ends[i]) == (len(tree), 2, 2)
        assert (groups.unshared[i], groups.longest[i]) == (sum(alone), max(alone))
    assert groups.lengths.dtype == groups.ends.dtype == np.int32 and groups.prompt_ids.dtype == np.uint64
    assert len(np.unique(groups.prompt_ids)) == 7


def test_a_second_build_is_a_memory_map(build, monkeypatch):
    first = build(GOOD)
    monkeypatch.setattr(token_cache, "_tokenize", lambda *a, **k: pytest.fail("tokenized again"))
    second = build(GOOD)
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(second.group(5).tree.tokens, first.group(5).tree.tokens)
    assert second.audit == first.audit


def test_one_group_is_read_without_the_rows_of_all_others(build, monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK", 7)  # several batches
    groups = build(GOOD).select(np.arange(29, -1, -1))
    monkeypatch.setattr(groups_lib.Store, "ids", lambda *_: pytest.fail("looked up in the whole file"))
    for i in range(30):
        assert groups.id(i) == groups.group(i).id == f"rows.jsonl:{29 - i}"


def racing(monkeypatch, path, during, after=None):
    """Writes to a file when its fingerprint was taken, and once more when its rows were read."""
    real, open_rows = sources.fingerprint, token_cache.open_rows

    def fingerprint(spec):
        found = real(spec)
        monkeypatch.setattr(sources, "fingerprint", real)
        during(path)
        return found

    def read(item, *how, **more):
        layout, rows = open_rows(item, *how, **more)
        return layout, itertools.chain(rows, (row for _ in "x" for row in (after(path) or ())) if after else ())

    monkeypatch.setattr(sources, "fingerprint", fingerprint)
    monkeypatch.setattr(token_cache, "open_rows", read)


STALE = "".join(json.dumps({**r, "chosen": "stale"}) + "\n" for r in GOOD)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow"])
@pytest.mark.parametrize("back", [False, True])
def test_a_file_that_changes_while_it_is_read_is_not_cached(build, tmp_path, monkeypatch, suffix, back):
    """Nor one that is what it was again when the reading ends."""
    path = tmp_path / f"data{suffix}"

    def write(word):
        rows = [{**r, "chosen": f"{word} {i}"} for i, r in enumerate(GOOD)]
        text = "".join(json.dumps(r) + "\n" for r in rows).encode()
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif suffix == ".arrow":
            table = pa.Table.from_pylist(rows)
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
        else:
            path.write_bytes(gzip.compress(text, mtime=0) if suffix.endswith(".gz") else text)

    write("green")
    with monkeypatch.context() as patch:
        racing(patch, path, lambda _: write("stale"), (lambda _: write("green")) if back else None)
        with pytest.raises(ValueError, match=rf"{path} changed while it was read"):
            build(str(path))
    assert not list((tmp_path / "cache").iterdir())
    write("green")
    assert all(b"stale" not in f.read_bytes() for f in (tmp_path / "cache").iterdir())
    groups = build(str(path))
    assert len(groups) == len(GOOD)


@pytest.mark.parametrize("back", [False, True])
def test_rows_that_change_while_they_are_read_are_not_cached(build, tmp_path, monkeypatch, back):
    """Of a database and of Python: where no file tells, the rows are hashed as they pass."""
    path = tmp_path / "rows.db"
    change = lambda sql: sqlite3.connect(path, isolation_level=None).execute(sql)
    change("CREATE TABLE t (prompt, chosen, rejected)")
    change("INSERT INTO t VALUES ('q', 'green', 'no')")
    change("CREATE TABLE other (n)")
    good = [{"prompt": "q", "chosen": "green", "rejected": "no"}]
    mine = [dict(good[0])]
    sources.register("mine", lambda: iter([dict(r) for r in mine]))
    cases = {
        f"sqlite:///{path}?table=t": lambda word: lambda _: change(f"UPDATE t SET chosen = '{word}'") and None,
        "python://mine": lambda word: lambda _: mine[0].update(chosen=word),
    }
    for spec, write in cases.items():
        with monkeypatch.context() as patch:
            racing(patch, path, write("stale"), write("green") if back else None)
            with pytest.raises(ValueError, match=r"changed while it was read.*start again") as error:
                build(spec)
        assert spec in str(error.value) and not list((tmp_path / "cache").glob("*.arrow"))
        write("green")(None)
        assert len(build(spec)) == 1
        for kept in (tmp_path / "cache").iterdir():
            kept.unlink()
    racing(monkeypatch, path, lambda _: change("INSERT INTO other VALUES (1)") and None)
    assert len(build(next(iter(cases)))) == 1  # another table is nobody's business
    registered.REGISTERED.clear()


def test_a_folder_that_gets_another_file_is_not_cached(build, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(STALE)
    racing(monkeypatch, folder, lambda _: (folder / "b.jsonl").write_text(STALE) and None)
    with pytest.raises(ValueError, match=r"b\.jsonl of .*folder changed while it was read"):
        build(str(folder))


def test_a_cached_file_is_not_read_to_be_witnessed(build, monkeypatch):
    build(GOOD)
    monkeypatch.setattr(sources.Witness, "check", lambda _: pytest.fail("nothing was read"))
    build(GOOD)


def test_fingerprint_follows_data_chat_and_options(build, tokenizer):
    before = build(GOOD).fingerprint
    assert build(GOOD[1:]).fingerprint != before
    assert build(GOOD, Chat(tokenizer, max_length=500)).fingerprint != before
    assert build(GOOD, ties="keep").fingerprint != before
    assert build(GOOD, on_bad_row="error").fingerprint == before


def test_a_build_that_fails_leaves_nothing(build, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(token_cache.pa.ipc, "new_file", fail)
    with pytest.raises(OSError, match="No space left"):
        build(GOOD)
    assert list((tmp_path / "cache").iterdir()) == []


def cut(size):
    return lambda content: content[: size if isinstance(size, int) else int(size * len(content))]


def zeroed(share):
    """As after a power cut: the length was written, the last bytes were not."""
    return lambda content: content[: int(share * len(content))].ljust(len(content), b"\0")


def flipped(share):
    def flip(content):
        at = int(share * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]

    return flip


REMAINS = [*map(cut, (0, 9, 0.5, -2)), *map(zeroed, (0.0, 0.5, 0.99)), *map(flipped, (0, 0.2, 0.5, 0.8, 1))]


@pytest.mark.parametrize("suffix", [".arrow", ".json"])
@pytest.mark.parametrize("remains", range(len(REMAINS)))
def test_a_damaged_file_is_built_again(build, tmp_path, caplog, suffix, remains):
    first = build(GOOD)
    (path,) = (tmp_path / "cache").glob(f"*{suffix}")
    whole = path.read_bytes()
    path.unlink()  # `first` still maps it
    path.write_bytes(REMAINS[remains](whole))
    with caplog.at_level(logging.WARNING, "absl"):
        again = build(GOOD)
    np.testing.assert_array_equal(again.group(5).tree.tokens, first.group(5).tree.tokens)
    assert (again.audit, path.read_bytes()) == (first.audit, whole)
    (record,) = [record for record in caplog.records if "is built again" in record.getMessage()]
    assert path.stem in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.parametrize("suffix", [".arrow", ".json"])
def test_a_flipped_bit_anywhere_is_noticed(build, tmp_path, suffix):
    build(GOOD)
    (path,) = (tmp_path / "cache").glob(f"*{suffix}")
    (arrow,) = (tmp_path / "cache").glob("*.arrow")
    whole = path.read_bytes()
    path.unlink()
    for at in np.random.default_rng(0).choice(8 * len(whole), 1000, replace=False).tolist():
        path.write_bytes(whole[: at // 8] + bytes([whole[at // 8] ^ 1 << at % 8]) + whole[at // 8 + 1 :])
        with pytest.raises(ValueError, match=rf"{path.name} is not what was written"):
            token_files.read_audit(arrow)
    path.write_bytes(whole)
    assert token_files.read_audit(arrow).rows == len(GOOD)


def test_a_file_under_another_name_is_not_taken_for_it(build, tmp_path):
    build(GOOD)
    (arrow,) = (tmp_path / "cache").glob("*.arrow")
    for suffix in (".arrow", ".json"):
        arrow.with_suffix(suffix).rename(tmp_path / f"{STEM}{suffix}")
    with pytest.raises(ValueError, match="is not what was written"):
        token_files.read_audit(tmp_path / f"{STEM}.arrow")


@pytest.fixture
def interrupted(build, monkeypatch, tmp_path):
    """A build of three jobs, stopped in the third; what it left, and a whole file of the same for comparison."""
    monkeypatch.setattr(token_cache, "CHUNK", 10)
    build(GOOD, cache_dir=tmp_path / "whole")
    (whole,) = (tmp_path / "whole").glob("*.arrow")
    tokenize, jobs = token_cache._tokenize, []

    def stop(chat, job, **kwargs):
        if len(jobs) == 2:
            raise KeyboardInterrupt
        jobs.append(job)
        return tokenize(chat, job, **kwargs)

    monkeypatch.setattr(token_cache, "_tokenize", stop)
    with pytest.raises(KeyboardInterrupt):
        build(GOOD)
    jobs.clear()
    monkeypatch.setattr(token_cache, "_tokenize", lambda chat, job, **kw: jobs.append(job) or tokenize(chat, job, **kw))
    (left,) = (tmp_path / "cache").iterdir()
    return left, whole, jobs


def finished(directory, whole):
    """Whether a directory holds the same file as that of a build without interruption, its audit, and nothing else."""
    (arrow,), (text,) = directory.glob("*.arrow"), directory.glob("*.json")
    same = arrow.read_bytes() == whole.read_bytes() and text.read_text() == whole.with_suffix(".json").read_text()
    return same and len(list(directory.iterdir())) == 2


def test_an_interrupted_build_goes_on_where_it_stopped(build, interrupted, tmp_path, monkeypatch):
    _, whole, jobs = interrupted
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    stream = io.StringIO()
    build(GOOD, progress=stream)
    assert [where for job in jobs for where, _ in job.rows] == [f"rows.jsonl:{i}" for i in range(20, 30)]
    last = stream.getvalue().splitlines()[-1]
    assert finished(tmp_path / "cache", whole) and "30 rows" in last and "(20 of them by an earlier run)" in last


@pytest.mark.parametrize("remains", [*map(cut, (0, 5, 8, 0.2, 0.5, 0.8, -1)), *REMAINS[4:7], *REMAINS[8:]])
def test_a_build_goes_on_from_however_much_was_written(build, interrupted, tmp_path, remains):
    partial, whole, _ = interrupted
    partial.write_bytes(remains(partial.read_bytes()))
    build(GOOD)
    assert finished(tmp_path / "cache", whole)


def test_a_flipped_bit_in_what_a_killed_build_left_is_noticed(interrupted):
    """What is gone on from is, bit by bit, what was written; nothing crashes."""
    partial = interrupted[0]
    columns, content = groups_lib.schema(Preferences()), partial.read_bytes()
    read = lambda: [(repr(r.groups.to_pydict()), r.audit, r.rows) for r in token_files.intact_results(file, columns)]
    with open(partial, "r+b") as file:
        wanted, ended = read(), []
        assert len(wanted) == 2
        for at in np.random.default_rng(0).choice(8 * len(content), 1000, replace=False).tolist():
            os.pwrite(file.fileno(), bytes([content[at // 8] ^ 1 << at % 8]), at // 8)
            file.seek(0)  # drops the buffer
            found = read()
            assert found == wanted[: len(found)]
            ended.append(len(found))
            os.pwrite(file.fileno(), content[at // 8 : at // 8 + 1], at // 8)
    assert set(ended) == {0, 1, 2}  # 2: of bytes that fill up to 8, and of the footer


def test_rows_that_changed_since_are_tokenized_again(build, interrupted, tmp_path, tokenizer):
    """A killed build may have read what its file held for a moment only."""
    partial, whole, jobs = interrupted
    path, content = tmp_path / "rows.jsonl", (tmp_path / "rows.jsonl").read_text()
    path.write_text(content.replace("question", "riddle", 15))  # the second job of three
    again = token_cache._jobs(str(path), "auto", "")
    stale = [token_cache._tokenize(Chat(tokenizer), job, task=Preferences("skip"), keep=False) for job in again]
    with pytest.raises(KeyboardInterrupt), open(partial, "r+b") as file:
        file.truncate()
        token_files.write_results(partial, file, stops(stale[:2]), stale[0].groups.schema, pytest.fail)
    path.write_text(content)
    jobs.clear()
    build(GOOD)
    assert len(jobs) == 3 and finished(tmp_path / "cache", whole)


def stops(results):
    yield from results
    raise KeyboardInterrupt


def test_what_another_process_is_writing_is_left_alone(build, interrupted, tmp_path):
    partial, whole, jobs = interrupted
    with open(partial, "rb") as file:
        assert token_files.try_lock(file)
        build(GOOD)
    assert len(jobs) == 3 and partial.exists()
    partial.unlink()
    assert finished(tmp_path / "cache", whole)


STEM = "0123456789abcdef" * 2


def test_what_killed_builds_left_is_removed_after_a_day(build, tmp_path):
    """And nothing else is, however old and however named."""
    ours = {
        f"{STEM}.256.abcdefg{i}.partial": head for i, head in enumerate((token_files.MARK, b"ARR", b"", b"\0" * 99))
    }
    theirs = {
        **dict.fromkeys(("model.partial", "tmpa.partial", f"{STEM}.partial"), token_files.MARK),
        f"x{STEM}.256.abcdefgh.partial": token_files.MARK,
        f"{STEM}.256.abcdefgx.partial": b"a thesis",
        f"{STEM}.256.abcdefgh.partial.txt": b"",
        f"{STEM}.arrow.txt": b"",
    }
    (tmp_path / "cache").mkdir()
    for name, head in {**ours, **theirs}.items():
        path = tmp_path / "cache" / name
        path.write_bytes(head)
        os.utime(path, (0, time.time() - 25 * 3600))
    (tmp_path / "elsewhere").write_bytes(token_files.MARK)
    link = tmp_path / "cache" / f"{STEM}.256.link0000.partial"
    link.symlink_to(tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere", (0, 0))
    fresh = tmp_path / "cache" / f"{STEM}.256.fresh000.partial"
    fresh.touch()
    build(GOOD)
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert {*theirs, fresh.name, link.name} <= left and not left & ours.keys() and (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_a_killed_parent(tokenizer_dir, tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from rmjax.batches import token_cache as cache, chat, tasks\n"
        "from rmjax.runtime import progress\n"
        "if __name__ == '__main__':\n"
        f"    tokens = chat.Chat(chat.load_tokenizer({str(tokenizer_dir)!r}))\n"
        "    progress.SECONDS = 0.0\n"
        f"    options = {{'workers': 2, 'cache_dir': {str(tmp_path)!r}}}\n"
        "    options['progress'] = sys.stdout\n"
        "    cache.build('synthetic://pairs?n=1000000', tokens, tasks.Preferences(), **options)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert all(process.stdout.readline() for _ in range(3))  # so both processes are at work
    finally:
        process.send_signal(number)
    process.communicate(timeout=15)  # returns when nobody holds the pipe any more
    (left,) = tmp_path.glob("*.partial")
    with open(left, "rb") as file:
        results = list(token_files.intact_results(file, groups_lib.schema(Preferences())))
    assert results and all(result.groups.num_rows == sum(result.audit.sources.values()) for result in results)


def killed(chat, job):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_it_writes(chat, job):
    """Half of the result is in the pipe when its writer dies."""

    def send(self, data, write=os.write):
        os.write(self._handle, bytes(data)[: len(data) // 2])
        killed(chat, job)

    multiprocessing.connection.Connection._send = send
    return "result" * 100


@pytest.mark.parametrize("work", [killed, killed_while_it_writes])
def test_a_process_that_is_killed_ends_the_build(work):
    with pytest.raises(token_cache.WorkerDied, match=r"a tokenizing process died.*config.data.workers=0"):
        list(token_cache._run(iter(range(50)), work, None, 2))


def test_what_was_tokenized_before_a_process_died_stays(build, interrupted, tmp_path, monkeypatch):
    _, whole, _ = interrupted

    def dies(jobs, *_):
        raise token_cache.WorkerDied("died")

    with monkeypatch.context() as patch, pytest.raises(token_cache.WorkerDied):
        patch.setattr(token_cache, "_run", dies)
        build(GOOD)
    build(GOOD)
    assert finished(tmp_path / "cache", whole)


def test_processes_give_the_same_groups_in_the_same_order(build, monkeypatch, tmp_path):
    alone = build(SPEC)
    monkeypatch.setattr(token_cache, "SMALL", 100)
    monkeypatch.setattr(token_cache, "CHUNK", 50)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    stream = io.StringIO()
    many = build(SPEC, workers=1, cache_dir=tmp_path / "other", progress=stream)
    assert (many.fingerprint, many.audit) == (alone.fingerprint, alone.audit)
    np.testing.assert_array_equal(many.lengths, alone.lengths)
    for i in (0, 57, len(alone) - 1):
        assert many.id(i) == alone.id(i)
        np.testing.assert_array_equal(many.group(i).tree.tokens, alone.group(i).tree.tokens)
    lines = stream.getvalue().splitlines()
    assert any("rows/s" in line for line in lines) and "400 rows read and tokenized" in lines[-1]


def test_progress_tells_the_time_left(build, monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK", 10)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    build(GOOD, progress=(stream := io.StringIO()))
    first, second, *_ = stream.getvalue().splitlines()
    assert "10/30" in first and "20/30" in second and " left  " in second and "rows/s" in second


BAD = [
    row("q", "", "no"),
    row("q", "same", "same"),
    row("q", 3, "no"),
    row("q", "yes", "no", preference=0.5),
    row("q", "yes", "no", chosen_score=1, rejected_score=2),
    row("q", "very " * 200 + "long", "no"),
]


def test_every_bad_row_is_counted_with_an_example(build, tokenizer):
    groups = build(GOOD + BAD, Chat(tokenizer, max_length=100))
    counted = {reason: count.rows for reason, count in groups.audit.reasons.items()}
    reasons = ("empty_response", "identical_responses", "wrong_type", "tie", "conflicting_label", "over_long")
    assert counted == dict.fromkeys(reasons, 1)
    assert groups.audit.rows == len(groups) + sum(counted.values()) == len(GOOD) + len(BAD)
    assert groups.audit.reasons["wrong_type"].example.startswith("rows.jsonl:32: chosen is int 3, expected")
    assert groups.audit.sources == {"rows": len(GOOD)}
    (line,) = [x for x in ledger.lines(groups, groups) if "over_long" in x]
    longest = groups.audit.reasons["over_long"].tokens
    assert f"data.max_length={longest} takes all" in line
    assert len(build(GOOD + BAD, Chat(tokenizer, max_length=longest))) == len(GOOD) + 1


def test_keep_ties_and_rows_whose_defect_allows_training(build):
    groups = build(GOOD + BAD, on_bad_row="keep", ties="keep")
    assert len(groups) == len(GOOD) + 4  # empty, identical, tie, long
    kept = {reason: count.kept for reason, count in groups.audit.reasons.items()}
    assert kept == {"empty_response": 1, "identical_responses": 1, "wrong_type": 0, "conflicting_label": 0}
    np.testing.assert_array_equal(groups.group(len(GOOD) + 2).labels["ties"], [[0, 1], [1, 0]])


def test_bad_rows_can_stop_the_run(build):
    with pytest.raises(ValueError, match=r"rows\.jsonl:30: the last .* has no text.*on_bad_row='skip'"):
        build(GOOD + BAD, on_bad_row="error")
    with pytest.raises(ValueError, match=r"5 of 36 rows \(13.9%\).*max_bad_fraction allows 10.0%"):
        build(GOOD + BAD[:5] + [row("q", "", "x")], max_bad_fraction=0.1)
    build(GOOD + BAD[3:4] * 20, max_bad_fraction=0.1)  # ties are a choice
    with pytest.raises(ValueError, match="none of its 1 rows could be used"):
        build(BAD[:1] * 1, format="pair_text")


def test_each_source_has_its_own_format(build, tmp_path):
    (tmp_path / "plain.jsonl").write_text(json.dumps({"chosen": "a", "rejected": "b"}) + "\n")
    (tmp_path / "text.jsonl").write_text(json.dumps(row("q", "a", "b", source="mine")) + "\n")
    groups = build(f"{tmp_path}/plain.jsonl,{tmp_path}/text.jsonl")
    assert groups.audit.sources == {"plain": 1, "mine": 1}
    (tmp_path / "odd.jsonl").write_text('{"n": 1}\n')
    with pytest.raises(ValueError, match=r"odd\.jsonl: unknown data format"):
        build(f"{tmp_path}/odd.jsonl")


def test_split_keeps_each_prompt_on_one_side(build):
    groups = build(SPEC)
    train, validation = groups_lib.split(groups, 0.2, seed=1)
    assert len(train) + len(validation) == len(groups)
    assert 0.15 < len(validation) / len(groups) < 0.25
    assert not set(train.prompt_ids) & set(validation.prompt_ids)
    ids = lambda g: [g.id(i) for i in range(len(g))]
    assert sorted(ids(train) + ids(validation)) == sorted(ids(groups))
    assert ids(groups_lib.split(groups, 0.2, seed=1)[1]) == ids(validation)
    assert ids(groups_lib.split(groups, 0.2, seed=2)[1]) != ids(validation)
    with pytest.raises(ValueError, match="leaves training or validation without any"):
        groups_lib.split(groups, 0.0, seed=1)


def test_views(build):
    groups = build(GOOD)
    view = groups.select([4, 2])
    assert [view.id(i) for i in range(2)] == ["rows.jsonl:4", "rows.jsonl:2"]
    np.testing.assert_array_equal(view.lengths, groups.lengths[[4, 2]])
    np.testing.assert_array_equal(view.select([1]).group(0).tree.tokens, groups.group(2).tree.tokens)
    sample = groups.sample(10, seed=3)
    assert len(sample) == 10 and len(groups.sample(1000, seed=3)) == len(groups)
    assert len({sample.id(i) for i in range(10)}) == 10


def test_trees_that_fit_no_row_are_counted(build):
    groups = build(GOOD)
    limit = int(np.median(groups.lengths))
    fitting = groups.fitting(limit)
    assert fitting.lengths.max() <= limit
    count = fitting.audit.reasons["tree_too_long"]
    assert (count.rows, count.tokens) == (len(groups) - len(fitting), groups.lengths.max())
    assert "tree_too_long" not in groups.audit.reasons
    assert groups.fitting(int(groups.lengths.max())) is groups
    assert f"plan.row_tokens={groups.lengths.max()} takes all" in "\n".join(ledger.lines(fitting, fitting))
    with pytest.raises(ValueError, match="no tree fits a row of 3 tokens"):
        groups.fitting(3)


def test_duplicates_contradictions_and_shared_prompts(build):
    rows = [("q", "a", "b"), ("q", "a", "b"), ("q", "b", "a"), ("q", "a", "c"), ("other", "a", "b")]
    groups = build([row(*r) for r in rows])
    assert ledger.repeats(groups) == (2, 1)
    assert ledger.repeats(groups.select([0, 1])) == (1, 0)
    assert ledger.shared_prompts(groups.select([0, 4]), groups.select([1, 2, 3])) == 1
    assert "(their scores mislead)" in ledger.lines(groups.select([0]), groups.select([1]))[-1]


def test_length_auc_is_the_share_of_longer_winners(build, tokenizer):
    chat = Chat(tokenizer)
    groups = build(GOOD)
    turns = lambda r, side: [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r[side]}]
    texts = [[chat.render(turns(r, side)) for side in ("chosen", "rejected")] for r in GOOD]
    lengths = [[len(s) for s in chat.encode(both)] for both in texts]
    expected = np.mean([(a > b) + 0.5 * (a == b) for a, b in lengths])
    assert 0.5 < expected < 1
    assert ledger.length_auc(groups) == pytest.approx(expected)


def test_the_demos_data_cannot_be_told_by_length(build):
    groups = build("synthetic://pairs?n=1500")
    assert 0.45 < ledger.length_auc(groups) < 0.55
    assert any("length alone predicts" in line for line in ledger.lines(*groups_lib.split(groups, 0.1, 0)))


def test_audit_goes_through_json_and_merges():
    first, second = ledger.Audit(rows=2, sources={"a": 1}), ledger.Audit(rows=3, sources={"a": 1, "b": 1})
    first.add("over_long", "f:0", "9 tokens", tokens=9)
    second.add("over_long", "f:3", "7 tokens", tokens=7)
    first.merge(second)
    assert (first.rows, first.sources) == (5, {"a": 2, "b": 1})
    assert first.reasons["over_long"] == ledger.Count(2, 0, "f:0: 9 tokens", 9, {"f": 2})
    assert ledger.Audit.from_json(first.to_json()) == first
    with pytest.raises(ValueError, match="unknown reason"):
        first.add("boring", "f:0", "")


def test_lists_are_put_together_as_arrow_reads_them():
    hashes = [np.array(x, np.uint64) for x in ([0, 2**63 + 1], [], [5, 2**64 - 1, 1])]
    ints = [np.array(x, np.int32) for x in ([1, 2, 3], [4])]
    floats = [np.array([[0.5, np.inf]]).ravel(), np.zeros(0)]
    for cells, kind in ((hashes, groups_lib.HASHES), (ints, groups_lib.INTS), (floats, groups_lib.FLOATS)):
        assert token_cache._array(cells, kind).equals(pa.array(cells, kind))
    with pytest.raises(TypeError, match="same_kind"):
        token_cache._array([np.array([0.5])], groups_lib.INTS)

"""Sources beyond single files: databases, Python iterables, aligned files, the hub, and what rows are called."""

import gzip
import hashlib
import http.server
import itertools
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy

import rmjax.data
from rmjax.batches import token_cache
from rmjax.batches.chat import Chat
from rmjax.batches.tasks import Preferences
from rmjax.data import formats, sources
from rmjax.data.sources import database as database_lib
from rmjax.data.sources import files, listing, registered


def rows(spec):
    return list(sources.open_source(spec))


def lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(value) + "\n" for value in values)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# Files


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_keys_that_a_columns_type_filled_in_are_taken_out(tmp_path, suffix):
    """Every object of a column has the keys of all; JSON text, and JSON lines, keep the nulls that were written."""
    asked = lambda n, arguments: {
        "role": "assistant",
        "tool_calls": [{"function": {"name": n, "arguments": arguments}}],
    }
    tool = lambda name, **properties: {"function": {"name": name, "parameters": {"properties": properties}}}
    values = [
        {"messages": [asked("look", {"city": "Paris"})], "tools": [tool("look", city={"type": "string"})]},
        {"messages": [{"from": "human", "value": "hi"}, asked("now", {})], "tools": [tool("add", a={"type": "int"})]},
        {"messages": [asked("say", {"of": [{"x": 1}, {"y": None}, None]})]},
    ]
    values[0]["scores"] = {"a": None, "b": 1.0}
    text = {"role": "user", "content": '{"null": null}'}
    values[0]["messages"].append(text)
    table = pa.Table.from_pylist(values)
    path = tmp_path / f"filled.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    first, second, third = (row for _, row in rows(str(path)))
    assert "a" in table.to_pylist()[0]["tools"][0]["function"]["parameters"]["properties"]
    assert first["messages"] == values[0]["messages"] and first["tools"] == values[0]["tools"]
    assert second["messages"] == values[1]["messages"] and second["tools"] == values[1]["tools"]
    assert third["messages"][0]["tool_calls"][0]["function"]["arguments"] == {"of": [{"x": 1}, {}, None]}
    assert first["scores"] == {"a": None, "b": 1.0} and third["tools"] is None
    written = [{"messages": [asked("look", {"unit": None})]}]
    assert [row for _, row in rows(str(lines(tmp_path / "written.jsonl", written)))] == written


# Databases


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "labels.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE pairs (id INTEGER PRIMARY KEY, prompt TEXT, chosen TEXT, score REAL)")
        values = [(3 - i, f"q{3 - i}", json.dumps([{"role": "user"}]), None) for i in range(3)]
        connection.executemany("INSERT INTO pairs VALUES (?, ?, ?, ?)", values)
        connection.execute('CREATE TABLE "odd name" (n INT)')
        connection.execute('INSERT INTO "odd name" VALUES (1)')
        connection.execute("CREATE VIEW good AS SELECT prompt FROM pairs WHERE id > 1")
    connection.close()
    return path


def test_a_table_in_the_order_of_its_key(database, monkeypatch):
    text = '[{"role": "user"}]'  # JSON in a column stays text
    expected = [(f"pairs:{i}", {"id": i + 1, "prompt": f"q{i + 1}", "chosen": text, "score": None}) for i in range(3)]
    spec = f"sqlite:///{database}?table=pairs"  # four slashes in all: the path is absolute
    assert "sqlite:////" in spec and rows(spec) == expected
    assert sources.count_rows(spec) == 3 and sources.source_name(spec) == "pairs"
    monkeypatch.chdir(database.parent)
    assert rows("sqlite:///labels.db?table=pairs") == expected
    assert rows("sqlite:///labels.db?table=good") == [("good:0", {"prompt": "q2"}), ("good:1", {"prompt": "q3"})]
    assert rows("sqlite:///labels.db?table=odd%20name") == [("odd name:0", {"n": 1})]
    assert sources.source_name("sqlite:///labels.db?table=odd%20name") == "odd name"


def test_a_query_is_sql_as_it_stands(database, tmp_path):
    query = "SELECT id AS n, prompt FROM pairs WHERE prompt LIKE '%q%' AND '10:30 :x' = '10:30 :x' ORDER BY id DESC, n;"
    other = lines(tmp_path / "a.jsonl", [{"n": 0}])
    spec = f"{other}, sqlite:///{database}?query={query}"
    assert [row["n"] for _, row in rows(spec)] == [0, 3, 2, 1]
    assert [where for where, _ in rows(spec)][1] == "query:0"
    assert sources.count_rows(spec) == 4


def test_a_fingerprint_of_a_table_is_of_its_rows(database):
    spec = f"sqlite:///{database}?table=pairs"
    before = sources.fingerprint(spec)
    change = lambda sql: sqlite3.connect(database, isolation_level=None).execute(sql)
    change('INSERT INTO "odd name" VALUES (2)')
    assert sources.fingerprint(spec) == before
    change("UPDATE pairs SET score = 1 WHERE id = 2")
    assert sources.fingerprint(spec) != before


def test_rows_of_a_database_are_not_all_in_memory(tmp_path):
    path = tmp_path / "big.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (text TEXT)")
        connection.executemany("INSERT INTO t VALUES (?)", ((f"{i} " + "x" * 1000,) for i in range(20_000)))
    connection.close()
    spec = f"sqlite:///{path}?table=t"
    assert sources.count_rows(spec) == 20_000  # and SQLAlchemy is imported
    tracemalloc.start()
    assert sum(len(row["text"]) > 1000 for _, row in sources.open_source(spec)) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 6e6  # 20 MB of text
    tracemalloc.stop()


def test_what_is_wrong_with_a_database_is_said(database, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"labels\.db has no table 'pair'; it has: good, odd name, pairs"):
        sources.parts(f"sqlite:///{database}?table=pair")
    with pytest.raises(FileNotFoundError, match=r"no file '.*absent\.db'"):
        sources.parts(f"sqlite:///{tmp_path}/absent.db?table=t")
    assert not (tmp_path / "absent.db").exists()
    for options in ("", "?table=pairs&query=SELECT 1"):
        with pytest.raises(ValueError, match=r"name a table with \?table=NAME, or give SQL"):
            sources.parts(f"sqlite:///{database}{options}")
    with pytest.raises(ValueError, match="no such column: absent"):
        rows(f"sqlite:///{database}?query=SELECT absent FROM pairs")
    (tmp_path / "text.db").write_text("not a database" * 100)
    with pytest.raises(ValueError, match=r"text\.db: file is not a database"):
        sources.parts(f"sqlite:///{tmp_path}/text.db?table=t")
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(ValueError, match=r"needs SQLAlchemy: pip install 'sqlalchemy"):
        sources.parts(f"sqlite:///{database}?table=pairs")


NO_QUERIES = {
    "DROP TABLE pairs": "is not a query",
    "INSERT INTO pairs VALUES (9, 'a', 'b', 1)": "is not a query",
    "ATTACH DATABASE '{tmp}/evil.db' AS e": "is not a query",
    "VACUUM INTO '{tmp}/evil.db'": "is not a query",
    "PRAGMA journal_mode = DELETE": "is not a query",
    "-- SELECT\nDROP TABLE pairs": "is not a query",
    "/* SELECT */ DROP TABLE pairs": "is not a query",
    "": "is not a query",
    "SELECT 1; DROP TABLE pairs": "is several statements",
    "SELECT ';' ; DROP TABLE pairs": "is several statements",
    "SELECT E'\\'' ; DROP TABLE pairs; --'": "is several statements",
    "SELECT 1 a$$; DROP TABLE pairs; --$$": "is several statements",
    "SELECT * INTO copy FROM pairs": "has INTO",
    "WITH x AS (SELECT 9) INSERT INTO pairs (id) SELECT * FROM x": "has INTO",
    "SELECT 1 /* /* */ ' */ ; DROP TABLE pairs; --'": "has a comment in a comment",
    "SELECT 'a": "does not end",
    "SELECT 1 /*": "does not end",
}


@pytest.mark.parametrize("sql", NO_QUERIES)
def test_what_is_no_query_is_refused_before_it_is_sent(database, tmp_path, monkeypatch, sql):
    before = database.read_bytes(), sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(database_lib, "_connect", lambda _: pytest.fail("it was sent"))
    with pytest.raises(ValueError, match=NO_QUERIES[sql]):
        rows(f"sqlite:///{database}?query={sql.format(tmp=tmp_path)}")
    assert before == (database.read_bytes(), sorted(path.name for path in tmp_path.iterdir()))


def test_what_is_a_query_is_sent(database):
    for sql in (
        "SELECT ';' AS a, \"prompt\" FROM pairs -- ; DROP",
        "(SELECT 1)",
        "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 5) SELECT i FROM n;;",
        "/* ; */ VALUES (1), (2)",
        "SELECT json_extract(chosen, '$[0].role') AS role, 'into' AS i FROM pairs",
    ):
        assert database_lib.checked_query(sql) == sql.rstrip(";")
        if sql[0] != "(":  # PostgreSQL's
            assert rows(f"sqlite:///{database}?query={sql}")


@pytest.mark.parametrize(
    "sql",
    [
        *[sql for sql in NO_QUERIES if sql and not re.search(r"\$\$|E'|/\* /", sql)],
        "WITH x AS (SELECT 1) DELETE FROM pairs",
        "WITH x AS (SELECT 1) UPDATE pairs SET score = 1",
        "SELECT load_extension('{tmp}/evil')",
        "SELECT fts3_tokenizer('simple')",
        "CREATE TEMP TABLE t (n)",
        "BEGIN; DELETE FROM pairs; COMMIT",
        "PRAGMA query_only = OFF",
        "PRAGMA writable_schema = ON",
        "PRAGMA wal_checkpoint",
    ],
)
def test_sqlite_is_read_whatever_it_is_asked(database, tmp_path, monkeypatch, sql):
    """The connection refuses by itself what the text would have been refused for."""
    before = database.read_bytes(), sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(database_lib, "checked_query", lambda sql: sql)
    with pytest.raises((ValueError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error)):
        rows(f"sqlite:///{database}?query={sql.format(tmp=tmp_path)}")
    assert before == (database.read_bytes(), sorted(path.name for path in tmp_path.iterdir()))


@pytest.mark.parametrize("name", ["a b.db", "50%.db", "a?b.db", "a#b.db", "[1]*.db", "a\\b.db", "a&b.db", "ключ.db"])
def test_databases_of_any_name_in_any_mode(tmp_path, name, monkeypatch):
    """Also one that is being written to (WAL), whose reader sees what was committed."""
    path = tmp_path / name
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("CREATE TABLE t (n)")
    writer.execute("INSERT INTO t VALUES (7)")
    name = name.replace("%", "%25").replace("?", "%3F")  # as in any URL
    assert [row["n"] for _, row in rows(f"sqlite:///{tmp_path}/{name}?table=t")] == [7]
    monkeypatch.chdir(tmp_path)
    assert [row["n"] for _, row in rows(f"sqlite:///{name}?mode=rwc&query=SELECT n FROM t")] == [7]
    writer.close()
    path.chmod(0o444)
    assert [row["n"] for _, row in rows(f"sqlite:///{name}?table=t")] == [7]


def test_postgresql_is_asked_for_a_transaction_that_reads(monkeypatch):
    """Its drivers begin one with READ ONLY then (SQLAlchemy's dialects); there is no server here to see it."""
    given = []
    engine = sqlalchemy.create_engine("sqlite://")
    monkeypatch.setattr(sqlalchemy, "create_engine", lambda url, **_: engine)
    connect = sqlalchemy.Engine.connect
    monkeypatch.setattr(
        sqlalchemy.Engine, "connect", lambda self: given.append(self.get_execution_options()) or connect(self)
    )
    assert sources.parts("postgresql://h/db?query=SELECT 1")
    assert [options["postgresql_readonly"] for options in given] == [True]
    with pytest.raises(ValueError, match=r"postgresql://me:\*\*\*@h/db: query=DROP TABLE t is not a query"):
        sources.parts("postgresql://me:secret@h/db?query=DROP TABLE t")


def test_a_password_is_not_shown():
    with pytest.raises(ValueError, match=r"postgresql\+absent://me:\*\*\*@host/db: Can't load plugin") as error:
        sources.parts("postgresql+absent://me:secret@host/db?table=t")
    assert "secret" not in str(error.value)


# Python


@pytest.fixture(autouse=True)
def unregister():
    yield
    registered.REGISTERED.clear()


def test_rows_registered_by_name():
    rmjax.data.register("mine", [{"n": 0}, {"n": 1}])
    assert rows("python://mine") == [("mine:0", {"n": 0}), ("mine:1", {"n": 1})]
    assert sources.count_rows("python://mine") == 2 and sources.source_name("python://mine") == "mine"
    rmjax.data.register("mine", lambda: ({"n": i} for i in range(3)))
    assert len(rows("python://mine")) == len(rows("python://mine")) == 3
    assert sources.count_rows("python://mine") is None


def test_a_fingerprint_of_registered_rows_is_of_their_contents_or_version():
    found = []
    for data, version in [([1, 2], None), ((1, 2), None), ([2, 1], None), ([1, 2], "v1"), ([7], "v1")]:
        rmjax.data.register("mine", [{"n": n} for n in data], version=version)
        found.append(sources.fingerprint("python://mine"))
    assert found[0] == found[1] != found[2] and found[3] == found[4] != found[0]
    rmjax.data.register("mine", [{"n": np.float32(0.5), "a": np.arange(3)}])
    assert sources.fingerprint("python://mine") == sources.fingerprint("python://mine")
    rmjax.data.register("mine", [{"n": object()}])
    with pytest.raises(
        ValueError, match=r"row 0 of python://mine cannot be hashed .*object\); give register\(\) a ver"
    ):
        sources.fingerprint("python://mine")


def test_what_can_be_read_only_once_is_refused():
    with pytest.raises(ValueError, match="can be read only once"):
        rmjax.data.register("mine", ({"n": i} for i in range(3)))
    once = iter([{"n": 0}])
    rmjax.data.register("mine", lambda: once)
    assert len(rows("python://mine")) == 1
    with pytest.raises(ValueError, match="can be read only once"):
        rows("python://mine")


def test_unknown_names_and_rows_of_another_kind():
    with pytest.raises(ValueError, match=r"has that name; call rmjax.data.register\('mine', rows\); known: none"):
        sources.parts("python://mine")
    with pytest.raises(ValueError, match="cannot be the name of a source"):
        rmjax.data.register("a,b", [])
    rmjax.data.register("mine", ["text"])
    with pytest.raises(ValueError, match="row 0 of python://mine is a str, expected a dict"):
        rows("python://mine")


def test_registered_rows_are_tokenized_once(tmp_path, tokenizer):
    data = [{"prompt": "q", "chosen": "yes", "rejected": f"no {i}"} for i in range(3)]
    build = lambda: token_cache.build("python://mine", Chat(tokenizer), Preferences(), cache_dir=tmp_path, workers=0)
    rmjax.data.register("mine", data, version="1")
    assert [build().id(i) for i in range(3)] == ["mine:0", "mine:1", "mine:2"]
    rmjax.data.register("mine", lambda: pytest.fail("they were read again"), version="1")
    assert len(build()) == 3
    rmjax.data.register("mine", data[:2], version="2")
    assert len(build()) == 2


# Aligned files


def test_rows_of_aligned_files_are_one(tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(["p0", "p1"]))
    lines(tmp_path / "responses.jsonl.gz", [{"response_1": "a", "response_2": "b"}] * 2)
    (tmp_path / "rewards.json").write_text(json.dumps([[0.5, 1], [1, 2.0]]))
    spec = "aligned://" + "+".join(
        str(tmp_path / name) for name in ("prompts.json", "responses.jsonl.gz", "rewards.json")
    )
    name = "prompts.json+responses.jsonl.gz+rewards.json"
    both = {"response_1": "a", "response_2": "b"}
    assert rows(spec) == [
        (f"{name}:0", {"prompt": "p0", **both, "rewards": [0.5, 1]}),
        (f"{name}:1", {"prompt": "p1", **both, "rewards": [1, 2.0]}),
    ]
    assert sources.source_name(spec) == "prompts" and sources.count_rows(spec) == 2
    layout = formats.detect([row for _, row in rows(spec)])
    (record,) = layout.read(rows(spec)[1][1], source="s", where="w")
    assert layout.name == "labelled_responses" and record.wins.tolist() == [[0, 0], [1, 0]]
    lines(tmp_path / "responses.jsonl.gz", [["a", "b"]] * 2)
    assert rows(spec)[0][1] == {"prompt": "p0", **both, "rewards": [0.5, 1]}
    before = sources.fingerprint(spec)
    (tmp_path / "rewards.json").write_text(json.dumps([[0.5, 1], [1, 2.5]]))
    assert sources.fingerprint(spec) != before
    with pytest.raises(ValueError, match="item 0 is a str, expected an object"):
        rows(str(tmp_path / "prompts.json"))  # alone it is refused, as ever


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([["a"]], r"equally many rows, found a\.json 2, b\.json 1"),
        ([["a"]] * 3, r"equally many rows, found a\.json 2, b\.json 3"),
        ([{"prompt": "p0"}, {"prompt": "other"}], r"row 1: b\.json and a file before it differ in 'prompt'"),
        ([None, None], r"b\.json, item 0 is 'None', expected an object, text or messages"),
        ([[True], [1]], "item 0 is '.True.', expected"),
    ],
)
def test_files_that_are_not_aligned(tmp_path, second, message):
    for name, values in (("a", ["p0", "p1"]), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        rows(f"aligned://{tmp_path}/a.json+{tmp_path}/b.json")


def test_an_aligned_source_names_several_single_files(tmp_path):
    lines(tmp_path / "d" / "a.jsonl", [{"n": 0}])
    lines(tmp_path / "d" / "b.jsonl", [{"n": 0}])
    with pytest.raises(ValueError, match="is 2 files, expected one"):
        sources.parts(f"aligned://{tmp_path}/d+{tmp_path}/d/a.jsonl")
    with pytest.raises(ValueError, match=r"expected several files, joined by \+"):
        sources.parts(f"aligned://{tmp_path}/d/a.jsonl")


# Files


def test_files_of_the_same_name_are_told_apart(tmp_path):
    for name in ("a/x/rows.jsonl", "b/x/rows.jsonl", "b/x/more.jsonl"):
        lines(tmp_path / name, [{"n": name}])
    expected = [(f"{name}:0", {"n": name}) for name in ("a/x/rows.jsonl", "b/x/more.jsonl", "b/x/rows.jsonl")]
    assert rows(str(tmp_path)) == rows(f"{tmp_path}/**/*.jsonl") == expected
    assert [where for where, _ in rows(f"{tmp_path}/b")] == ["more.jsonl:0", "rows.jsonl:0"]


def test_a_directory_with_several_splits_is_refused(tmp_path):
    for name in ("train-00000.jsonl", "train-00001.jsonl", "test-00000.jsonl"):
        lines(tmp_path / name, [{"n": name}])
    with pytest.raises(ValueError, match=r"holds several splits \(train, test\); choose one with a glob"):
        rows(str(tmp_path))
    assert len(rows(f"{tmp_path}/train-*")) == 2 and len(rows(f"{tmp_path}/*")) == 3


def test_counts_for_progress(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"n": i} for i in range(5)]))
    assert sources.count_rows(str(path)) is None  # it would have to be loaded
    next(sources.open_source(str(path)))
    assert sources.count_rows(str(path)) == 5
    path.write_text("[]")
    assert sources.count_rows(str(path)) is None
    assert sources.count_rows("synthetic://pairs") == 1000 == len(rows("synthetic://pairs"))
    assert sources.count_rows("synthetic://pairs?n=70&seed=3") == 70 == len(rows("synthetic://pairs?n=70&seed=3"))


# Names


NAMES = [
    "lr=[1e-5]",
    "a\\b",
    "*",
    "what?",
    "x,y",
    ",",
    "a%20b",
    "#1",
    " two  words ",
    "odd:",
    "a+b",
    "~me",
    "[!a]",
]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_path_of_any_name_is_no_pattern(tmp_path, monkeypatch, name, relative):
    """Beside it stands what it would match, or be cut into, if it were taken for a pattern or a list."""
    for other in ("lr=1", "lr=e", "ab", "b", "x", "y", "whatx", "a", "a b", "two", "words", "s"):
        lines(tmp_path / other / "rows.jsonl", [{"n": "other"}])
    lines(tmp_path / name / "rows.jsonl", [{"n": 0}])
    lines(tmp_path / name / "more[1].jsonl", [{"n": 1}])
    lines(tmp_path / name / "more1.jsonl", [{"n": 2}])
    lines(tmp_path / "last.jsonl", [{"n": 9}])
    monkeypatch.chdir(tmp_path)
    at = name.lstrip() if relative else f"{tmp_path}/{name}"
    if relative and name != at:
        pytest.skip("spaces before a path belong to the list")
    numbers = lambda spec: [row["n"] for _, row in rows(spec)]
    assert numbers(f"{at}/rows.jsonl") == [0]
    assert numbers(f"{at}/more[1].jsonl") == [1]
    assert sorted(numbers(f"{at}/more*.jsonl")) == [1, 2]
    assert numbers(f"{at}/rows.js*") == [0]
    assert numbers(at) == [2, 1, 0]
    assert numbers(f"last.jsonl, {at}/rows.jsonl,{at}/more[[]1].jsonl ,last.jsonl") == [9, 0, 1, 9]
    assert sources.local_files(f"{at}/more[1].jsonl") == [Path(at, "more[1].jsonl")]
    assert sources.source_name(f"{at}/rows.jsonl") == "rows" and sources.source_name(f"{at}/more[1].jsonl") == "more[1]"
    assert sources.source_name(f"{at}/*.jsonl") == name.split(".")[0]
    assert len(sources.fingerprint(f"{at}/rows.jsonl")) == 64
    assert numbers(f"aligned://{at}/rows.jsonl+{at}/rows.jsonl") == [0]


def test_a_directory_called_like_a_scheme(tmp_path, monkeypatch):
    for name in ("odd:/x/a.jsonl", "s3:/x/a.jsonl", "below/s3:/x/a.jsonl"):
        lines(tmp_path / name, [{"n": name}])
    monkeypatch.chdir(tmp_path)
    assert rows("odd://x/a.jsonl")[0][1] == {"n": "odd:/x/a.jsonl"}
    assert rows("below/s3://x/a.jsonl")[0][1] == {"n": "below/s3:/x/a.jsonl"}
    assert rows(f"{tmp_path}/s3://x/a.jsonl")[0][1] == rows("./s3:/x/a.jsonl")[0][1] == {"n": "s3:/x/a.jsonl"}


def test_patterns_are_patterns_still(tmp_path):
    for name in ("a/x1.jsonl", "a/x2.jsonl", "b/x1.jsonl"):
        lines(tmp_path / name, [{"n": name}])
    numbers = lambda spec: [row["n"] for _, row in rows(f"{tmp_path}/{spec}")]
    assert numbers("[ab]/x[1].jsonl") == ["a/x1.jsonl", "b/x1.jsonl"]
    assert numbers("a/x?.jsonl") == ["a/x1.jsonl", "a/x2.jsonl"] and len(numbers("**/*.jsonl")) == 3
    with pytest.raises(FileNotFoundError, match="nothing matches it"):
        rows(f"{tmp_path}/[cd]/x1.jsonl")
    with pytest.raises(ValueError, match="unknown scheme ftp"):
        rows("ftp://host/a.jsonl")


def test_a_bucket_with_names_like_patterns(tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(listing.fsspec.core, "url_to_fs", lambda item: (fs, item.replace("s3://", "/")))
    monkeypatch.setattr(fs, "ukey", lambda name: name, raising=False)
    for name in ("/lr=[1]/a.jsonl", "/lr=[1]/b[1].jsonl", "/lr=1/a.jsonl", "/lr=[1]/b1.jsonl"):
        with fs.open(name, "w") as file:
            file.write(json.dumps({"n": name}) + "\n")
    numbers = lambda spec: [row["n"] for _, row in rows(spec)]
    assert numbers("s3://lr=[1]/b[1].jsonl") == ["/lr=[1]/b[1].jsonl"]
    assert numbers("s3://lr=[1]/*.jsonl") == ["/lr=[1]/a.jsonl", "/lr=[1]/b1.jsonl", "/lr=[1]/b[1].jsonl"]
    assert numbers("s3://lr=[1]") == numbers("s3://lr=[1]/*.jsonl") and numbers("s3://lr=?/a.jsonl") == [
        "/lr=1/a.jsonl"
    ]


def test_a_copy_that_a_power_cut_emptied_is_made_again(tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fs, "ukey", lambda name: name, raising=False)
    with fs.open("/cut/a.jsonl", "w") as file:
        file.write('{"n": 1}\n')
    copy = listing._local_copy(fs, "/cut/a.jsonl")
    for left in (b"", b'{"n"'):
        copy.write_bytes(left)
        assert listing._local_copy(fs, "/cut/a.jsonl").read_bytes() == b'{"n": 1}\n'
    assert [path.name for path in copy.parent.iterdir()] == ["a.jsonl"]


# The hub: huggingface_hub itself, in a process of its own, against a server that answers as huggingface.co does.


COMMITS = {"main": "0" * 40, "v2": "2" * 40}


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories o/n (revisions main and v2) and o/gated, which is listed but gives no file."""

    root = None  # a directory for each revision

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).rstrip("/")
        found = re.fullmatch(r"(?:/api)?/datasets/o/(n|gated)(?:/(tree|resolve|revision)/([^/]+)(?:/(.*))?)?", path)
        if not found:
            return self.fail(404, "RepoNotFound")
        name, what, revision, path = found[1], found[2], found[3] or "main", found[4] or ""
        revision = {commit: name for name, commit in COMMITS.items()}.get(revision, revision)
        if revision not in COMMITS:
            return self.fail(404, "RevisionNotFound")
        if what in (None, "revision"):
            return self.give({"id": f"o/{name}", "sha": COMMITS[revision], "private": False, "tags": []}, revision)
        if what == "resolve" and name == "gated":
            return self.fail(403, "GatedRepo")
        below = self.root / revision
        if not (below / path).exists():
            return self.fail(404, "EntryNotFound")
        if what == "resolve":
            return self.give((below / path).read_bytes(), revision)
        deep = "recursive=true" in self.path.lower()
        entries = sorted((below / path).rglob("*") if deep else (below / path).iterdir())
        kinds = {True: "directory", False: "file"}
        about = lambda f: {"path": str(f.relative_to(below)), "oid": "0" * 40, "type": kinds[f.is_dir()], "size": 9}
        return self.give([about(f) for f in entries], revision)

    do_HEAD = do_GET

    def give(self, body, revision):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        etag = f'"{hashlib.sha256(raw).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": COMMITS[revision], "Content-Length": str(len(raw))}
        self.answer(200, headers, raw)

    def fail(self, status, code):
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": code, "Content-Length": "0"}, b"")

    def answer(self, status, headers, raw):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw)

    def log_message(self, *args):
        pass


READ_ALL = """
import json, sys
from rmjax.data import sources
for spec in json.loads(sys.argv[1]):
    try:
        print(json.dumps([sources.source_name(spec), list(sources.open_source(spec))]))
    except (ValueError, FileNotFoundError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture
def hub(tmp_path):
    """Reads sources from a hub; gives for each (its name, its rows) or (the type of an error, its text)."""
    Hub.root = tmp_path / "hub"
    root = Hub.root / "main"
    lines(root / "plain.jsonl", [{"n": 0}])
    (root / "README.md").write_text("a card")
    for i, place in enumerate(itertools.product(("helpful", "harmless"), ("train", "test"))):
        lines(root / "data" / place[0] / f"{place[1]}.jsonl.gz", [{"n": 10 + i}])
    (root / "splits" / "train").mkdir(parents=True)
    for i in range(2):
        pq.write_table(pa.table({"n": [20 + i]}), root / "splits" / "train" / f"part-{i}.parquet")
    lines(Hub.root / "v2" / "plain.jsonl", [{"n": 2}])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        **{"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")},
        **{"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"},
    }

    def read(*specs, **changed):
        command = [sys.executable, "-c", READ_ALL, json.dumps(specs)]
        done = subprocess.run(command, env=env | changed, capture_output=True, text=True, check=True)
        read.told = done.stderr
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    yield read
    server.shutdown()
    server.server_close()


def test_hub_files_directories_globs_and_revisions(hub):
    at = "hf://datasets/o/n"
    specs = {
        f"{at}/plain.jsonl": [["plain.jsonl:0", {"n": 0}]],
        f"{at}@v2/plain.jsonl": [["plain.jsonl:0", {"n": 2}]],
        f"{at}@v2/*.jsonl": [["plain.jsonl:0", {"n": 2}]],
        f"{at}/data/*/train.jsonl.gz": [
            ["harmless/train.jsonl.gz:0", {"n": 12}],
            ["helpful/train.jsonl.gz:0", {"n": 10}],
        ],
        f"{at}/splits/train": [["part-0.parquet:0", {"n": 20}], ["part-1.parquet:0", {"n": 21}]],
        f"{at}/splits": [["part-0.parquet:0", {"n": 20}], ["part-1.parquet:0", {"n": 21}]],
        f"{at}/**/*.parquet": [["part-0.parquet:0", {"n": 20}], ["part-1.parquet:0", {"n": 21}]],
    }
    assert hub(*specs) == [("o/n", found) for found in specs.values()]


def test_hub_errors_say_what_to_do(hub):
    absent, gated, revision, entry, glob, several, kinds = hub(
        "hf://datasets/o/absent/a.jsonl",
        "hf://datasets/o/gated/plain.jsonl",
        "hf://datasets/o/n@v9/plain.jsonl",
        "hf://datasets/o/n/other.jsonl",
        "hf://datasets/o/n/*.parquet",
        "hf://datasets/o/n/data",
        "hf://datasets/o/n",
    )
    page = "https://huggingface.co/datasets/o"
    assert absent[0] == "FileNotFoundError" and "no such repository, or a private one" in absent[1]
    assert f"{page}/absent" in absent[1] and "`hf auth login`" in absent[1] and "HF_TOKEN" in absent[1]
    assert "gated; accept its terms at " + page + "/gated, then log in" in gated[1]
    assert "no such revision" in revision[1] and f"{page}/n/tree/main" in revision[1]
    assert (
        entry[0] == "FileNotFoundError" and "other.jsonl" in entry[1] and f"its files are at {page}/n/tree" in entry[1]
    )
    assert glob == ("FileNotFoundError", "hf://datasets/o/n/*.parquet: no .parquet, .arrow, .jsonl, .json file there")
    assert several == (
        "ValueError",
        "hf://datasets/o/n/data holds several splits (train, test); choose one with a glob",
    )
    assert "several kinds (.jsonl, .parquet)" in kinds[1]


@pytest.mark.parametrize("how", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_what_the_hub_gave_before_is_read_where_it_cannot_be_reached(hub, how):
    at = "hf://datasets/o/n"
    before = [f"{at}/plain.jsonl", f"{at}@v2/*.jsonl", f"{at}/splits/train"]
    online = hub(*before)
    assert "cannot be reached" not in hub.told
    *offline, absent, elsewhere = hub(*before, f"{at}/data/helpful/test.jsonl.gz", "hf://datasets/o/m/a.jsonl", **how)
    assert offline == online
    assert f"so {at}/splits/train is what its cache on this machine has: 2 files of revision {'0' * 40}" in hub.told
    for kind, text in (absent, elsewhere):
        assert kind == "FileNotFoundError" and "the hub cannot be reached (" in text and "`hf download`" in text


# Buckets


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """fsspec's file system in memory, in place of a bucket's."""
    fs = fsspec.filesystem("memory")
    monkeypatch.setitem(listing.PACKAGES, "memory", "none")
    monkeypatch.setitem(sources.SCHEMES, "memory", sources.SCHEMES["gs"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    listing.remote_files.cache_clear()
    yield fs
    fs.store.clear()
    listing.remote_files.cache_clear()


def test_a_bucket_is_read_by_file_glob_and_directory(bucket, tmp_path):
    for name in ("a", "b"):
        bucket.pipe(f"/bucket/set/{name}.jsonl", json.dumps({"text": name}).encode())
    bucket.pipe("/bucket/set/README.md", b"x")
    texts = lambda spec: [row["text"] for _, row in sources.open_source(spec)]
    assert texts("memory://bucket/set/a.jsonl") == ["a"]
    assert texts("memory://bucket/set/*.jsonl") == texts("memory://bucket/set") == ["a", "b"]
    assert sources.source_name("gs://bucket/set/train.jsonl.gz") == "train"
    before = sources.fingerprint("memory://bucket/set/a.jsonl")
    copies = sorted((tmp_path / "cache").rglob("*.jsonl"))
    bucket.pipe("/bucket/set/a.jsonl", b'{"text": "c"}')  # as another run would find it
    assert sources.fingerprint("memory://bucket/set/a.jsonl") == before
    listing.remote_files.cache_clear()
    assert (
        texts("memory://bucket/set/a.jsonl") == ["c"] and sources.fingerprint("memory://bucket/set/a.jsonl") != before
    )
    assert len(copies) == 2 and len(sorted((tmp_path / "cache").rglob("*.jsonl"))) == 3


def test_what_is_not_in_a_bucket_or_cannot_be_had_is_said(bucket, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"memory://bucket/gone\.jsonl: there is no such file or bucket"):
        sources.parts("memory://bucket/gone.jsonl")
    with pytest.raises(FileNotFoundError, match=r"memory://bucket/\*\.jsonl: no \.parquet"):
        sources.parts("memory://bucket/*.jsonl")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gs://b/a\.jsonl needs the package gcsfs; install it with pip"):
        sources.parts("gs://b/a.jsonl")


# Bounds


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_that_never_ends_is_not_read_whole(tmp_path, monkeypatch, suffix):
    path = lines(tmp_path / f"a{suffix}", [{"n": 1}, {"n": "x" * 5000}])
    monkeypatch.setattr(files, "MOST_LINE", 5010)
    assert len(rows(str(path))) == 2 == sources.count_rows(str(path))
    monkeypatch.setattr(files, "MOST_LINE", 5000)
    for read in (rows, sources.count_rows):
        with pytest.raises(ValueError, match=rf"{path}, line 2 is longer than 5,000 bytes"):
            read(str(path))

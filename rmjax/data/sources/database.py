"""Rows of a database: a table, or what a query gives, through SQLAlchemy (the extra `sql`).

A database is read, never written: SQL must be one query by its text, SQLite opens the file to read alone
and asks here whether it may do what a statement says, and PostgreSQL runs it in a read-only transaction. What functions
of a PostgreSQL server do outside its tables (write a file, send a message), they do, if the user may call them.
"""

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote_plus

from rmjax.data.sources.files import Row
from rmjax.data.sources.parts import Part, part_of_rows
from rmjax.runtime import passwords
from rmjax.suggestions import install

SCHEMES = ("sqlite", "postgresql")
FETCH = 1024  # rows in memory at a time
# What SQLite lets a connection do (https://sqlite.org/c3ref/c_alter_table.html), the pragmas by which SQLAlchemy finds
# tables and their columns, and functions that read or write other files where a build of SQLite has them.
READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_TRANSACTION)
PRAGMAS = ("table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo", "foreign_key_list")
FUNCTIONS = ("load_extension", "readfile", "writefile", "edit", "fts3_tokenizer")
QUERIES = ("SELECT", "WITH", "VALUES", "TABLE")
# Comments and what stands in quotes, in which no word and no semicolon counts: C comments, line comments, PostgreSQL's
# dollar quotes, its E'...' with backslashes, and strings and names, in which a quote is doubled.
_QUOTED = re.compile(
    r"""/\*.*?\*/ | --[^\n]* | (?<![\w$])\$(?P<tag>\w*)\$.*?\$(?P=tag)\$ | \bE'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*'
    | "(?:[^"]|"")*" | `(?:[^`]|``)*`""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_UNFINISHED = re.compile(r"""/\*|\*/|['"`]|(?<![\w$])\$\w*\$""")


def database_part(item: str) -> Part:
    """The rows of `sqlite:///relative.db?table=NAME` or `sqlite:////absolute.db?query=SELECT ...`.

    Everything after `query=` is SQL as it stands, commas and percent signs too; other options go to the driver. A
    password is better left to the driver (for PostgreSQL, PGPASSWORD or ~/.pgpass), because sources are printed. Rows
    are read FETCH at a time; those of a table in the order of its primary key, where it has one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: SQLAlchemy or the database's driver is not installed, neither or both of `table` and `query`, SQL
            that is not one query, no such table, or a database that does not answer.
    """
    try:
        import sqlalchemy
    except ModuleNotFoundError as error:
        raise ValueError(f"{item} needs SQLAlchemy: {install('sql')}") from error
    base, _, options = passwords.reveal(item).partition("?")
    before, *sql = re.split(r"(?:^|&)query=", options, maxsplit=1)
    named = dict(parse_qsl(before))
    table, query = named.pop("table", ""), "".join(sql)
    url = sqlalchemy.make_url(base).update_query_dict(named)
    if bool(table) == bool(sql):
        raise ValueError(f"{_shown(url)}: name a table with ?table=NAME, or give SQL with ?query=SELECT ...")
    try:
        query = checked_query(query) if sql else ""
    except ValueError as error:
        raise ValueError(f"{_shown(url)}: {error}") from None
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():  # SQLite would make the file
        raise FileNotFoundError(f"{_shown(url)}: no file {url.database!r}; looked from {Path.cwd()}")

    def rows() -> Iterator[Row]:
        with _connect(url) as connection:
            statement = _statement(connection, url, table, query)
            result = connection.execution_options(yield_per=FETCH).execute(statement)
            yield from map(dict, result.mappings())

    def count() -> int:
        with _connect(url) as connection:
            inner = _statement(connection, url, table, query)
            inner = inner.order_by(None) if table else inner.columns()
            return connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(inner.subquery())).scalar()

    with _connect(url) as connection:
        _statement(connection, url, table, query)
    return part_of_rows(item, table or "query", rows, count)


def _statement(connection: Any, url: Any, table: str, query: str) -> Any:
    import sqlalchemy

    if query:
        # SQLAlchemy would take ":name" for a parameter.
        return sqlalchemy.text(query.replace(":", r"\:"))
    inspector = sqlalchemy.inspect(connection)
    names = sorted([*inspector.get_table_names(), *inspector.get_view_names()])
    if table not in names:
        raise ValueError(f"{_shown(url)} has no table {table!r}; it has: {', '.join(names) or 'none'}")
    key = inspector.get_pk_constraint(table)["constrained_columns"]
    everything = sqlalchemy.select(sqlalchemy.text("*")).select_from(sqlalchemy.table(table))
    return everything.order_by(*map(sqlalchemy.column, key))


def table_name(item: str) -> str:
    """The table that a source names, or "query"."""
    table = re.search(r"[?&]table=([^&]+)", item)
    return unquote_plus(table[1]) if table else "query"


@contextlib.contextmanager
def _connect(url: Any) -> Iterator[Any]:
    """A connection that can only read."""
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(_read_only(url), poolclass=sqlalchemy.pool.NullPool)
        if url.get_backend_name() == "sqlite":
            sqlalchemy.event.listen(engine, "connect", _restrict_sqlite)
        else:
            engine = engine.execution_options(postgresql_readonly=True)  # BEGIN READ ONLY, by each of its drivers
        with engine.connect() as connection:
            yield connection
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{_shown(url)} needs the package {error.name}, a driver of its database; install it"
        ) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise ValueError(f"{_shown(url)}: {str(getattr(error, 'orig', error)).strip()}") from error


def _read_only(url: Any) -> Any:
    """The URL that opens a SQLite file to read alone; any other URL as it is."""
    if url.get_backend_name() != "sqlite":
        return url
    path = quote(str(Path(url.database).absolute()))  # SQLite reads its file names as URIs then
    return url.set(database=f"file:{path}").update_query_dict({"mode": "ro", "uri": "true"})


def _restrict_sqlite(connection: Any, _: Any) -> None:
    """Takes from a SQLite connection all that is not reading; attaching and VACUUM INTO would write other files."""
    connection.execute("PRAGMA query_only = ON")
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.set_authorizer(_authorize)


def _authorize(action: int, first: str | None, second: str | None, *_: Any) -> int:
    if action == sqlite3.SQLITE_PRAGMA:
        allowed = first in PRAGMAS
    elif action == sqlite3.SQLITE_FUNCTION:
        allowed = second not in FUNCTIONS
    else:
        allowed = action in READING
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _shown(url: Any) -> str:
    """The URL without its password."""
    return url.render_as_string(hide_password=True)


def checked_query(sql: str) -> str:
    """SQL without semicolons at its end; ValueError where its text is not that of one query.

    It may still be one that writes: `WITH x AS (DELETE ...) SELECT ...` of PostgreSQL; the connection sees to that.
    """
    sql = sql.strip().rstrip("; \t\r\n")
    if any("/*" in quoted[0][2:] for quoted in _QUOTED.finditer(sql) if quoted[0].startswith("/*")):
        raise ValueError(f"query={sql[:60]} has a comment in a comment; leave it out")
    plain = _QUOTED.sub(" ", sql)
    words = re.findall(r"\w+", plain.upper())
    first = words[0] if words else ""
    if first not in QUERIES or not re.match(r"[\s(]*\w", plain):
        raise ValueError(
            f"query={sql[:60]} is not a query; databases are only read, by {', '.join(QUERIES)}, and nothing was sent"
        )
    if _UNFINISHED.search(plain):
        raise ValueError(f"query={sql[:60]} has a quote or a comment that does not end; nothing was sent")
    if ";" in plain:
        raise ValueError(f"query={sql[:60]} is several statements; give one query, without a semicolon in it")
    if "INTO" in words:
        raise ValueError(f"query={sql[:60]} has INTO, which writes; databases are only read, and nothing was sent")
    return sql

"""Rows of a database: a table, or what a query gives, through SQLAlchemy (`pip install 'rmjax[sql]'`)."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

from rmjax import passwords

FETCH = 1024  # rows in memory at a time


@dataclasses.dataclass(frozen=True)
class Location:
    """What a database source names.

    Attributes:
        url: an sqlalchemy.URL.
        table: name of a table or view, "" with a query.
        query: SQL, "" with a table.
    """

    url: Any
    table: str
    query: str

    @property
    def name(self) -> str:
        """The table, or "query"."""
        return self.table or "query"

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows, FETCH at a time; those of a table in the order of its primary key, where it has one."""
        with _connect(self.url) as connection:
            result = connection.execution_options(yield_per=FETCH).execute(self._statement(connection))
            for row in result.mappings():
                yield dict(row)

    def count(self) -> int:
        """Number of rows, as the database says."""
        import sqlalchemy

        with _connect(self.url) as connection:
            inner = self._statement(connection)
            inner = inner.order_by(None) if self.table else inner.columns()
            return connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(inner.subquery())).scalar()

    def _statement(self, connection: Any) -> Any:
        import sqlalchemy

        if self.query:
            # SQLAlchemy would take ":name" for a parameter.
            return sqlalchemy.text(self.query.rstrip("; \n").replace(":", r"\:"))
        inspector = sqlalchemy.inspect(connection)
        names = sorted([*inspector.get_table_names(), *inspector.get_view_names()])
        if self.table not in names:
            raise ValueError(f"{_shown(self.url)} has no table {self.table!r}; it has: {', '.join(names) or 'none'}")
        key = inspector.get_pk_constraint(self.table)["constrained_columns"]
        everything = sqlalchemy.select(sqlalchemy.text("*")).select_from(sqlalchemy.table(self.table))
        return everything.order_by(*map(sqlalchemy.column, key))


def locate(item: str) -> Location:
    """Reads `sqlite:///relative.db?table=NAME`, `sqlite:////absolute.db?query=SELECT ...`, and finds out what is there.

    Everything after `query=` is SQL as it stands, commas and percent signs too; other options go to the driver. A
    password is better left to the driver (for PostgreSQL, PGPASSWORD or ~/.pgpass), because sources are printed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: SQLAlchemy or the database's driver is not installed, neither or both of `table` and `query`, no
            such table, or a database that does not answer.
    """
    try:
        import sqlalchemy
    except ModuleNotFoundError as error:
        raise ValueError(f"{item} needs SQLAlchemy: pip install 'rmjax[sql]'") from error
    base, _, options = passwords.reveal(item).partition("?")
    before, *query = re.split(r"(?:^|&)query=", options, maxsplit=1)
    named = dict(parse_qsl(before))
    table = named.pop("table", "")
    url = sqlalchemy.make_url(base).update_query_dict(named)
    if bool(table) == bool(query):
        raise ValueError(f"{_shown(url)}: name a table with ?table=NAME, or give SQL with ?query=SELECT ...")
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():  # SQLite would make the file
        raise FileNotFoundError(f"{_shown(url)}: no file {url.database!r}; looked from {Path.cwd()}")
    location = Location(url, table, query[0] if query else "")
    with _connect(url) as connection:
        location._statement(connection)
    return location


def name(item: str) -> str:
    """The table that a source names, or "query"."""
    found = re.search(r"[?&]table=([^&]+)", item)
    return unquote_plus(found[1]) if found else "query"


@contextlib.contextmanager
def _connect(url: Any) -> Iterator[Any]:
    import sqlalchemy

    try:
        with sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool).connect() as connection:
            yield connection
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{_shown(url)} needs the package {error.name}, a driver of its database; install it"
        ) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise ValueError(f"{_shown(url)}: {str(getattr(error, 'orig', error)).strip()}") from error


def _shown(url: Any) -> str:
    """The URL without its password."""
    return url.render_as_string(hide_password=True)

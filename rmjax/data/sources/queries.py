"""Whether SQL is one query: what the text alone says, before anything is sent to a database."""

import re

QUERIES = ("SELECT", "WITH", "VALUES", "TABLE")
# Comments and what stands in quotes, in which no word and no semicolon counts: C comments, line comments, PostgreSQL's
# dollar quotes, its E'...' with backslashes, and strings and names, in which a quote is doubled.
_QUOTED = re.compile(
    r"""/\*.*?\*/ | --[^\n]* | (?<![\w$])\$(?P<tag>\w*)\$.*?\$(?P=tag)\$ | \bE'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*'
    | "(?:[^"]|"")*" | `(?:[^`]|``)*`""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_UNFINISHED = re.compile(r"""/\*|\*/|['"`]|(?<![\w$])\$\w*\$""")


def checked(sql: str) -> str:
    """The query without semicolons at its end.

    It may still be one that writes: `WITH x AS (DELETE ...) SELECT ...` of PostgreSQL; the connection sees to that.

    Raises:
        ValueError: it is another statement than a query, or several, or cannot be told apart.
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

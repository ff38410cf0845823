"""Which groups a run takes, and how often: filters, samples and weights, decided from numbers that the cache holds.

Nothing here is part of the cache, so another filter, sample or weight tokenizes nothing again. Sources are called by
their names in the data: "owner/name" on the hub, the file's name, or what a row's own `source` column says.

    filter    an expression over FIELDS:  length < 2000 and source != 'x' and (margin >= 1 or agreement > 0.6)
    sample    groups of sources, or shares of theirs:  hh-rlhf=1000, openbmb/UltraFeedback=10%
    weights   how often the groups of a source are shown in an epoch:  helpsteer=2, hh-rlhf=0.25
"""

import ast
import math
import re
from collections.abc import Collection, Sequence

import numpy as np

from rmjax.batches.groups import Groups, draw_prompts
from rmjax.suggestions import did_you_mean

# What an expression may name: an attribute of Groups, and what it is.
FIELDS = {
    "length": ("longest", "tokens of the longest conversation"),
    "tokens": ("lengths", "tokens of the tree, where what conversations share counts once"),
    "prompt_characters": ("prompt_characters", "characters of the prompt's text"),
    "responses": ("responses", "how many there are"),
    "margin": ("margins", "the largest, in the source's units; 0 without any"),
    "agreement": ("agreements", "share of the annotators who gave the label; unknown is neither more nor less"),
    "weight": ("weights", "of the group in the loss"),
    "source": ("source", "name of the source"),
}
_PARTS = (
    *(ast.Expression, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.Add, ast.Sub, ast.Mult),
    *(ast.Div, ast.BitAnd, ast.BitOr, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In),
    *(ast.NotIn, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple),
)


def check_filter(text: str) -> list[str]:
    """Names the fields of an expression; one that is not over FIELDS is a ValueError."""
    known = "; the fields are " + ", ".join(f"{name} ({what})" for name, (_, what) in FIELDS.items())
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"config.data.filter={text!r} is no expression ({reason}){known}") from None
    for node in nodes:
        if isinstance(node, ast.Name) and node.id not in FIELDS:
            hint = did_you_mean(node.id, FIELDS)
            raise ValueError(f"config.data.filter={text!r}: {node.id!r} is no field{hint}{known}")
        literal = not isinstance(node, ast.Constant) or isinstance(node.value, int | float | str)
        if not isinstance(node, _PARTS) or not literal:
            what = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
            raise ValueError(f"config.data.filter={text!r}: {what} is no comparison of fields{known}")
    return list(dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name)))


def filtered(groups: Groups, text: str) -> Groups:
    """The groups of which an expression over FIELDS is true, at least one; the others are counted under `filter`."""
    if not text.strip():
        return groups
    import pandas as pd  # takes a moment, and most runs filter nothing

    fields = check_filter(text)
    columns = {name: getattr(groups, attribute) for name, (attribute, _) in FIELDS.items() if name in fields}
    if "source" in columns:
        columns["source"] = np.array(groups.sources, object)[groups.source]
    frame = pd.DataFrame(columns, index=range(len(groups)))
    try:
        kept = frame.eval(text.strip(), engine="python")
    except Exception as error:  # whatever pandas meets: numbers compared with text, for example
        raise ValueError(f"config.data.filter={text!r} cannot be evaluated: {error}") from None
    if not isinstance(kept, pd.Series) or kept.dtype != bool:
        raise ValueError(f"config.data.filter={text!r} is not true or false of each group; compare fields with values")
    if not kept.any():
        raise ValueError(f"config.data.filter={text!r} is true of none of {len(groups):,} groups; loosen it")
    left_out = ~kept.to_numpy()
    detail = ", ".join(f"{name} {x[left_out.argmax()]}" for name, x in columns.items())
    return groups.without(left_out, "filter", detail)


def parse_sample(text: str) -> dict[str, tuple[float, bool]]:
    """Reads `config.data.sample`; the value of "" is for the sources that have none of their own.

    >>> parse_sample("hh-rlhf=1000, owner/name=2.5%"), parse_sample("10%")
    ({'hh-rlhf': (1000.0, False), 'owner/name': (2.5, True)}, {'': (10.0, True)})
    """
    expected = "a number of groups or a share of them, at most 100%"
    amounts: dict[str, tuple[float, bool]] = {}
    for name, value in _items("sample", text, expected):
        share = value.endswith("%")
        amount = _number(value.removesuffix("%"))
        if amount is None or (amount > 100 if share else amount != int(amount)):
            raise ValueError(f"config.data.sample={text!r}: {value!r} is not {expected}")
        amounts[name] = amount, share
    return amounts


def sampled(groups: Groups, text: str, seed: int) -> Groups:
    """A fixed random part of each source that `text` names; the other groups are counted under `sample`.

    All groups of a prompt stay together, so a source may have a few more groups than were asked for. Of one seed, a
    smaller sample is part of a larger one, whatever the other sources are.
    """
    amounts = parse_sample(text)
    _check_names("sample", text, amounts.keys() - {""}, groups.sources)
    left_out = np.zeros(len(groups), bool)
    for k, name in enumerate(groups.sources):
        members = np.flatnonzero(groups.source == k)
        amount, share = amounts.get(name, amounts.get("", (100.0, True)))
        wanted = amount / 100 * len(members) if share else amount
        rng = np.random.default_rng([seed, *name.encode()])
        left_out[members] = ~draw_prompts(groups.prompt_ids[members], wanted, rng)
    if left_out.all():
        raise ValueError(f"config.data.sample={text!r} leaves none of {len(groups):,} groups; ask for more")
    return groups.without(left_out, "sample", f"not drawn ({text})")


def parse_weights(text: str) -> dict[str, float]:
    """Reads `config.data.weights`.

    >>> parse_weights("helpsteer=2, hh-rlhf=0.25")
    {'helpsteer': 2.0, 'hh-rlhf': 0.25}
    """
    expected = "how often the groups of a source are shown in an epoch, as in helpsteer=2,hh-rlhf=0.25"
    weights = {}
    for name, value in _items("weights", text, expected):
        if not name or (weight := _number(value)) is None:
            raise ValueError(f"config.data.weights={text!r} does not say {expected}")
        weights[name] = weight
    return weights


def weights(sources: Sequence[str], text: str) -> np.ndarray:
    """float64 [sources]: how often the groups of each are shown in an epoch; 1 for those that `text` does not name."""
    given = parse_weights(text)
    _check_names("weights", text, given, sources)
    return np.array([given.get(name, 1.0) for name in sources])


def _items(key: str, text: str, expected: str) -> list[tuple[str, str]]:
    """Splits "a=1, b=2" into pairs; a value alone belongs to ""."""
    pairs = [item.rpartition("=") for item in text.split(",")] if text.strip() else []
    items = [(name.strip(), value.strip()) for name, _, value in pairs]
    names = [name for name, _ in items]
    if len(set(names)) < len(names) or any(equals and not name.strip() for name, equals, _ in pairs):
        raise ValueError(f"config.data.{key}={text!r} does not give each source once {expected}")
    return items


def _number(text: str) -> float | None:
    """A number that is not negative, else None."""
    return float(text) if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) and math.isfinite(float(text)) else None


def _check_names(key: str, text: str, names: Collection[str], sources: Sequence[str]) -> None:
    for name in sorted(set(names) - set(sources)):
        shown = ", ".join(sources[:20]) + (f" and {len(sources) - 20} more" if len(sources) > 20 else "")
        raise ValueError(
            f"config.data.{key}={text!r}: there is no source {name!r}{did_you_mean(name, sources)}; there is {shown}"
        )

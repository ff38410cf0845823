"""Shows data before training, converts it, splits it, and keeps what is to be imitated.

    python -m rmjax.data inspect SOURCE                                        shows columns, format and first records
    python -m rmjax.data convert SOURCE --output=pairs.parquet                 converts any source to Parquet
    python -m rmjax.data split SOURCE --output=DIR --split=train=0.9,test=0.1  splits; no prompt is on both sides
    python -m rmjax.data audit SOURCE --tokenizer=DIR --html=audit.html        reports what is wrong with the data
    python -m rmjax.data keep_right JUDGEMENTS --output=right.jsonl            keeps judgements that are right

SOURCE is a file, a directory, a glob, hf://datasets/OWNER/NAME/..., sqlite:///FILE?table=NAME, python://NAME or
aligned://FILE+FILE, or several of them separated by commas.
"""

import argparse
import collections
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmjax.batches import showing
from rmjax.config import defaults
from rmjax.data import agreement, converting, formats, keeping, labelling, prompts, reading, sources, splitting
from rmjax.data.ledger import Audit, accuracy_shown, rows_lines
from rmjax.data.records import BadRow, Record
from rmjax.runtime import command_line, exits, files, passwords
from rmjax.runtime.command_line import Parser
from rmjax.suggestions import did_you_mean


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; see command_line.py for what becomes of errors."""
    argv = sys.argv[1:] if argv is None else argv
    with command_line.outcome(debug="--debug" in argv, stopped="stopped; nothing was written"):
        args = _parse(argv)
        try:
            args.run(args)
        except BrokenPipeError:  # a reader such as `head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(exits.FAILED)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parser()
    args, others = parser.parse_known_args(argv)
    args.overrides = [x for x in others if args.command == "audit" and x.startswith("--config.")]
    if wrong := [x for x in others if x not in args.overrides]:
        command = commands[args.command]
        known = [option for action in command._actions for option in action.option_strings]
        hint = did_you_mean(wrong[0].partition("=")[0], known, "{}")
        parser.error(f"{args.command} takes no argument {wrong[0]!r}{hint}")
    if args.command == "audit" and not (args.source or args.config):
        parser.error("audit needs a SOURCE, or a --config that names one")
    args.source = passwords.hide(args.source)
    if args.command == "audit":
        args.validation, args.benchmark = passwords.hide(args.validation), list(map(passwords.hide, args.benchmark))
        args.against = [(name, passwords.hide(source), format) for name, source, format in args.against]
    return args


def _parser() -> tuple[Parser, dict[str, Parser]]:
    raw: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser(prog="python -m rmjax.data", description=__doc__, **raw)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    commands = {}
    for name, (run, add_options, example) in COMMANDS.items():
        about = run.__doc__
        description = f"{about}\n\n  python -m rmjax.data {name} {example}"
        commands[name] = command = choices.add_parser(name, help=about, description=description, **raw)
        command.set_defaults(run=run)
        optional: Any = {"nargs": "?", "default": ""} if name == "audit" else {}
        source = "data to read: a file, directory, glob, or hf://datasets/..."
        command.add_argument("source", metavar="SOURCE", help=source, **optional)
        if name != "keep_right":  # its rows have one form
            _reading_options(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error as well")
        add_options(command)
    return parser, commands


def _reading_options(command: Parser) -> None:
    known = ["auto", *formats.FORMATS]
    text = "format of the rows; default: detected from the columns"
    command.add_argument("--format", default="auto", choices=known, metavar="NAME", help=text)
    text = "what columns are, as prompt=trajectory,system=system_prompt; ignore=NAME leaves one out"
    command.add_argument("--columns", default="", metavar="NAME=COLUMN,...", help=text)


def _inspect_options(inspect: Parser) -> None:
    inspect.add_argument("--show", type=int, default=3, metavar="N", help="number of records to show; default 3")
    text = "also show each record as a model with this tokenizer reads it, and what its chat template leaves out"
    inspect.add_argument("--tokenizer", default="", metavar="DIR", help=text)


def _split_options(command: Parser, required: bool = True) -> None:
    text = "where to write: a directory, or a .parquet file"
    command.add_argument("--output", required=True, type=Path, metavar="PATH", help=text)
    text = "parts and their shares; each part is written to NAME.parquet, and no prompt is in two of them"
    command.add_argument("--split", type=_shares, required=required, metavar="NAME=SHARE,...", help=text)
    command.add_argument("--seed", type=int, default=0, help="seed of the split; default 0")
    text = "what to do with an unusable row: stop, skip and count it (default), or keep it if it still allows training"
    command.add_argument("--on_bad_row", choices=("error", "skip", "keep"), default="skip", help=text)


def _convert_options(convert: Parser) -> None:
    _split_options(convert, required=False)
    label = convert.add_argument_group("options for Label Studio, where people label the data")
    text = "what to write: parquet (default), or label_studio, which writes tasks.json and config.xml into --output"
    label.add_argument("--to", choices=("parquet", "label_studio"), default="parquet", help=text)
    text = "what to ask people for: a preference between two responses (default), or a rating of each"
    label.add_argument("--ask", choices=labelling.KINDS, default=labelling.KINDS[0], help=text)
    text = "names of what is rated; default: quality"
    label.add_argument("--attributes", default="quality", metavar="NAME,...", help=text)
    label.add_argument("--scale", default="1,5", metavar="LOW,HIGH", help="lowest and highest rating; default: 1,5")


def _audit_options(audit: Parser) -> None:
    text = "directory or hub id of a tokenizer; without one lengths are in bytes"
    audit.add_argument("--tokenizer", default="", metavar="DIR", help=text)
    text = "validation data; the audit reports prompts that are in the training data too"
    audit.add_argument("--validation", default="", metavar="SOURCE", help=text)
    text = "benchmark data, checked in the same way; may be repeated"
    audit.add_argument("--benchmark", action="append", default=[], metavar="SOURCE", help=text)
    text = (
        "benchmarks, by name or as NAME=SOURCE: reports what of them is in the data, by prompts and by runs of tokens"
    )
    audit.add_argument("--against", type=_benchmarks, default=[], metavar="NAME[,NAME]", help=text)
    text = "objective to check the data for; default: detected from the labels"
    audit.add_argument("--objective", default="", metavar="NAME", help=text)
    text = (
        "config of a run, which gives SOURCE, tokenizer and objective; --config.KEY=VALUE changes a key, with or "
        "without FILE"
    )
    audit.add_argument("--config", default="", metavar="FILE", help=text)
    audit.add_argument("--html", type=Path, default=None, metavar="FILE", help="HTML file to write; it has plots")
    audit.add_argument("--json", action="store_true", help="print JSON instead of text")


def _keep_right_options(command: Parser) -> None:
    text = "where to write conversations of a question and an answer: a .jsonl file"
    command.add_argument("--output", required=True, type=Path, metavar="FILE", help=text)
    text = "most judgements to keep of a question; default: all that are right"
    command.add_argument("--most", type=int, default=0, metavar="N", help=text)


def _benchmarks(text: str) -> list[tuple[str, str, str]]:
    """Name, source and format of each benchmark."""
    from rmjax.evaluate import benchmarks

    try:
        return [(test.name, source, test.format or test.name) for test, source in benchmarks.parse(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _shares(text: str) -> dict[str, float]:
    try:
        return splitting.parse_shares(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------
# inspect
# ----------------------------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> None:
    """Shows columns, format and the first records."""
    for item in sources.split_spec(args.source):
        first = list(itertools.islice(sources.open_source(item), formats.LOOK))
        rows = [row for _, row in first]
        print(f"{item}: columns of {showing.looked_at(len(rows))}")
        print("\n".join(_columns(first)))
        try:
            print(f"format: {formats.detect(rows, args.format, args.columns).name}\n")
        except ValueError as error:
            print("\n".join(["first row:", *showing.first_row(rows[0])]), flush=True)
            raise ValueError(f"{item}: {error}") from None
        audit = Audit()
        histories: list[list[tuple[int, int]]] = []  # of what is preferred or not
        read = reading.records(item, format=args.format, columns=args.columns, audit=audit, progress=sys.stderr)
        records = _noting(read, histories)
        chat = _open_chat(args.tokenizer) if args.tokenizer else None
        for record in itertools.islice(records, args.show):
            print("\n".join([*showing.record(record), ""]))
            if chat is not None:
                try:
                    print("\n".join([*showing.rendering(chat, record), ""]))
                except BadRow as bad:
                    print(f"  cannot be rendered: {bad}\n")
        collections.deque(records, maxlen=0)  # counts the rest
        count = len(np.unique(prompts.ids(*prompts.flat(histories))))
        shown = [accuracy_shown(count, defaults().gate.accuracy)] * bool(count)
        print("\n".join([*rows_lines(audit), *shown, *agreement.lines(item, args.format, args.columns)]))


def _noting(records: Iterable[Record], histories: list[list[tuple[int, int]]]) -> Iterator[Record]:
    """The records, whose histories are noted where they have preferences."""
    for record in records:
        if record.wins.any():
            histories.append(prompts.histories(record))
        yield record


def _columns(rows: Sequence[tuple[str, sources.Row]]) -> list[str]:
    for where, row in rows:
        try:
            showing.columns([row])
        except RecursionError:
            raise ValueError(f"{where}: lists or objects are nested too deep in it to be shown") from None
    return showing.columns([row for _, row in rows])


def _open_chat(tokenizer: str) -> Any:
    from rmjax.batches.chat import Chat, load_tokenizer

    chat = Chat(load_tokenizer(tokenizer))
    for note in chat.notes:
        _say(f"chat template: {note}")
    return chat


# ----------------------------------------------------------------------------------------------------
# convert and split
# ----------------------------------------------------------------------------------------------------


def _to_label_studio(args: argparse.Namespace) -> None:
    if args.split:
        raise ValueError("--to=label_studio writes one project; split first, and convert the parts")
    audit = Audit()
    options = {"format": args.format, "columns": args.columns, "on_bad_row": args.on_bad_row, "progress": sys.stderr}
    records = reading.records(args.source, audit=audit, **options)
    try:
        low, high = map(int, args.scale.split(","))
    except ValueError:
        raise ValueError(f"--scale={args.scale} is not two whole numbers, as in 1,5") from None
    attributes = [name.strip() for name in args.attributes.split(",") if name.strip()]
    output = args.output.expanduser()
    count = labelling.write_project(output, records, args.ask, attributes=attributes, scale=(low, high), seed=args.seed)
    print("\n".join(rows_lines(audit)))
    print(f"{count:,} tasks in {output / 'tasks.json'}, their page in {output / 'config.xml'}")


def _convert(args: argparse.Namespace) -> None:
    """Converts any source to Parquet files of records, or to tasks for Label Studio."""
    (_to_label_studio if args.to == "label_studio" else _to_parquet)(args)


def _split(args: argparse.Namespace) -> None:
    """Splits by prompt, with equal shares of sources and labels in each part."""
    _to_parquet(args)


def _to_parquet(args: argparse.Namespace) -> None:
    audit = Audit()
    output = args.output.expanduser()
    options = {"format": args.format, "columns": args.columns, "on_bad_row": args.on_bad_row, "progress": sys.stderr}
    written, table = converting.convert(args.source, output, audit, shares=args.split, seed=args.seed, **options)
    print("\n".join([*rows_lines(audit), *table]))
    for file, count in written.items():
        print(f"{count:,} records in {file}")


# ----------------------------------------------------------------------------------------------------
# audit
# ----------------------------------------------------------------------------------------------------


def _audit(args: argparse.Namespace) -> None:
    """Reports what is wrong with data, what it costs, and whether length predicts the label."""
    from rmjax.report import audit_command

    if args.html:
        command_line.check_writable(args.html, f"--html={args.html}")
    with tempfile.TemporaryDirectory() as scratch:
        audit = audit_command.audit(args, Path(scratch))
    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(args.html, audit.page())
    if args.json:
        print(json.dumps({**audit.report, "notes": audit.notes, "problems": audit.problems}, indent=1))
    else:
        print("\n".join(audit.text()))
        for item in sources.split_spec(args.source) if args.source else ():
            print("".join(f"{line}\n" for line in agreement.lines(item, args.format, args.columns)), end="")
    if args.html:
        _say(f"page: {args.html}")


# ----------------------------------------------------------------------------------------------------
# keep_right
# ----------------------------------------------------------------------------------------------------


def _keep_right(args: argparse.Namespace) -> None:
    """Keeps the judgements of `rmjax.sample --judge` that are right, as conversations to imitate."""
    if args.most < 0:
        raise ValueError(f"--most={args.most}, expected at least 1, or 0 for all")
    output = args.output.expanduser()
    print("\n".join(keeping.lines(keeping.keep_right(args.source, output, args.most), output)))


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], Callable[[Parser], None], str]] = {
    "inspect": (_inspect, _inspect_options, "data/pairs.jsonl --show=2 --tokenizer=DIR"),
    "convert": (_convert, _convert_options, "data/pairs.jsonl --output=pairs.parquet"),
    "split": (_split, _split_options, "data/pairs.jsonl --output=DIR --split=train=0.8,validation=0.1,test=0.1"),
    "audit": (_audit, _audit_options, "data/pairs.jsonl --tokenizer=DIR --html=audit.html"),
    "keep_right": (_keep_right, _keep_right_options, "judgements.jsonl --output=right.jsonl --most=2"),
}

if __name__ == "__main__":
    main()

"""What all commands share: one paragraph for an error, and an exit code (exits.py) that says whose fault it is.

The error's class and its time decide: what cannot be read, opened or understood is bad input, unless the run was
`under_way` by then. An error that knows better has an attribute `exit_code`.
"""

import argparse
import contextlib
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags

from rmjax.runtime import exits, files, ownership, passwords
from rmjax.suggestions import did_you_mean

DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error as well.")
INPUT = (ValueError, OSError, flags.Error, app.UsageError)
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # OSErrors of no file's


def parse(argv: Sequence[str]) -> None:
    """Reads absl's flags. Raises flags.Error for a wrong flag or any other argument; SystemExit(0) after --help."""
    try:
        others = flags.FLAGS(list(argv))[1:]
    except SystemExit:  # absl shows the help and calls it a failure
        sys.exit(exits.DONE)
    if others:
        raise flags.Error(f"unexpected arguments {others}; options are written --name=value")


def parse_strictly(argv: Sequence[str]) -> list[str]:
    """For `app.run`: `parse`, whose errors end the command."""
    with outcome(debug="--debug" in argv):
        parse(argv)
    return list(argv[:1])


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line that names what was probably meant."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_argument("--helpfull", "--helpshort", action="help", help=argparse.SUPPRESS)  # as absl's commands

    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"invalid choice: '([^']*)'", message):
            known = re.findall(r"[\w.-]+", message.partition("choose from")[2])
            name = message.partition(":")[0].removeprefix("argument ")
            message = f"{name}: {wrong[1]!r} is none of {', '.join(known)}{did_you_mean(wrong[1], known)}"
        raise ValueError(f"{message}; --help shows commands that run")


def parser(module: str, doc: str | None) -> Parser:
    """The parser of a command that is the module `module`, whose docstring is its help; it has --debug."""
    raw = argparse.RawDescriptionHelpFormatter
    command = Parser(prog=f"python -m {module}", description=doc, formatter_class=raw, allow_abbrev=False)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error as well")
    return command


@contextlib.contextmanager
def outcome(
    *,
    debug: bool = False,
    log: Path | None = None,
    stopped: str = "stopped",
    at_once: tuple[type[Exception], ...] = (),
    tell: Callable[[str, int], None] = lambda *_: None,
) -> Iterator[None]:
    """Ends the process with a code of exits.py if there is an error, after one paragraph that says what is wrong.

    Args:
        debug: prints the traceback, too.
        log: file for the traceback of a failed run, in a folder of rmjax's own; bad input leaves none.
        stopped: the message on Ctrl-C.
        at_once: errors after which other threads are not waited for.
        tell: is called with the paragraph and the code before they take effect, as processes.fail.

    Raises:
        SystemExit: with the code.
        Exception: an unexpected one, as it is: it is a mistake of ours.
    """
    try:
        yield
    except KeyboardInterrupt:
        tell(stopped, exits.INTERRUPTED)
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(exits.INTERRUPTED)
    except Exception as error:
        code = code_of(error)
        if log is not None and code == exits.FAILED and (log.parent / ownership.MARKER).is_file():
            with contextlib.suppress(OSError):  # a full disk
                files.write_whole(log, passwords.masked(traceback.format_exc()))
                print(f"(the traceback is in {log})", file=sys.stderr)
        tell(paragraph(error), code)
        if not expected(error):
            raise
        if debug:
            print(passwords.masked(traceback.format_exc()), file=sys.stderr)
        print(f"error: {paragraph(error)}", file=sys.stderr, flush=True)
        if isinstance(error, at_once):
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)


@contextlib.contextmanager
def under_way() -> Iterator[None]:
    """From here on an error is a failure of the run, whatever its class."""
    try:
        yield
    except Exception as error:
        if code_of(error) == exits.BAD_INPUT and not isinstance(error, exits.InputError):
            error.exit_code = exits.FAILED  # type: ignore[attr-defined]
        raise


@contextlib.contextmanager
def leaving_nothing(directory: Path, unless: str = "") -> Iterator[Callable[..., Path]]:
    """Makes a directory to write into; after bad input everything that the command made there is deleted.

    Only noted paths are deleted: other programs may write into the directory meanwhile. Nothing is once it has the name
    `unless`.

    Yields:
        A function that notes a path which the command is about to make, and returns it. An existing path is not the
        command's, unless it has just been `made`. Directories are deleted where they are empty, so their contents are
        noted as well.
    """
    new = files.missing_directories(directory)
    kept = bool(unless) and (directory / unless).exists()
    directory.mkdir(parents=True, exist_ok=True)
    noted: list[Path] = []

    def note(path: Path, made: bool = False) -> Path:
        if made or not os.path.lexists(path):
            noted.append(path)
        return path

    try:
        yield note
    except Exception as error:
        if code_of(error) == exits.BAD_INPUT and (kept or not unless or not (directory / unless).exists()):
            ownership.remove([*reversed(noted), *new])
        raise


def json_object(text: str, flag: str) -> dict[str, Any] | None:
    """The JSON object that a flag gives, None for an empty text; ValueError names the flag."""
    if not text:
        return None
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{flag}={text} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{flag}={text} is not a JSON object")
    return values


def check_writable(path: Path, flag: str) -> None:
    """Checks that a file could be written, without making it or its directories; ValueError names the flag."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise ValueError(f"{flag}: {parent} is a file; name a path below a directory")
    target = path if path.exists() else parent
    if not os.access(target, os.W_OK):
        raise ValueError(f"{flag}: {target} may not be written to; name another place")


def code_of(error: Exception) -> int:
    if (code := getattr(error, "exit_code", None)) is not None:
        return code
    if isinstance(error, OSError) and error.errno in MACHINE:
        return exits.FAILED
    return exits.BAD_INPUT if isinstance(error, INPUT) else exits.FAILED


def expected(error: Exception) -> bool:
    """Whether its text alone explains it."""
    return isinstance(error, (*INPUT, RuntimeError, MemoryError)) or hasattr(error, "exit_code")


def paragraph(error: Exception) -> str:
    """An error's text without blank lines and secrets."""
    text = str(error.args[0]) if isinstance(error, flags.Error) and error.args else str(error)
    if isinstance(error, MemoryError):
        detail = f" ({text})" if text else ""
        text = f"this machine's memory is used up{detail}; give the process more, or it less to do"
    return passwords.masked(re.sub(r"\n\s*\n", "\n", text.strip()) or type(error).__name__)

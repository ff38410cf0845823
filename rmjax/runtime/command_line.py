"""What all commands share: one paragraph for an error, and an exit code (exits.py) that says whose it is.

Which one is decided by the error's class, and by when it comes: what cannot be read, opened or understood is bad
input, unless the run was `under_way` by then. An error that knows better has an attribute `exit_code`.
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
    """Reads absl's flags.

    Raises:
        flags.Error: a flag that is wrong, or what is no flag.
        SystemExit: with 0, after --help and its kin.
    """
    try:
        others = flags.FLAGS(list(argv))[1:]
    except SystemExit:  # absl's, who shows the help and calls it a failure
        sys.exit(exits.DONE)
    if others:
        raise flags.Error(f"unexpected arguments {others}; options are written --name=value")


def parse_strictly(argv: Sequence[str]) -> list[str]:
    """For `app.run`: as `parse`, and a mistake ends the command."""
    with outcome(debug="--debug" in argv):
        parse(argv)
    return list(argv[:1])


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line that names what was probably meant."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_argument("--helpfull", "--helpshort", action="help", help=argparse.SUPPRESS)  # as absl's commands

    def error(self, message: str) -> NoReturn:
        """Raises ValueError, which `outcome` prints."""
        raise ValueError(f"{self._explained(message)}; --help shows commands that run")

    def _explained(self, message: str) -> str:
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        if wrong:
            known = re.findall(r"[\w.-]+", message.partition("choose from")[2])
            what = message.partition(":")[0].removeprefix("argument ")
            return f"{what}: {wrong[1]!r} is none of {', '.join(known)}{did_you_mean(wrong[1], known)}"
        return message


def parser(module: str, doc: str | None) -> Parser:
    """The parser of a command that is the module `module`, whose docstring is its help; --debug is there."""
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
    """Ends the process as exits.py says if there is an error, and says in one paragraph what is wrong.

    Args:
        debug: prints the traceback, too.
        log: file for the traceback of a run that failed, in a folder of rmjax's own; bad input leaves none.
        stopped: the message on Ctrl-C.
        at_once: errors after which other threads are not waited for.
        tell: is called with the paragraph and the code before they take effect, as processes.fail.

    Raises:
        SystemExit: with the code.
        Exception: one that no command expects, as it is: it is a mistake of ours.
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
        marked: Any = error
        if code_of(error) == exits.BAD_INPUT and not isinstance(error, exits.InputError):
            marked.exit_code = exits.FAILED
        raise


@contextlib.contextmanager
def leaving_nothing(directory: Path, unless: str = "") -> Iterator[Callable[..., Path]]:
    """Makes a directory to write into; if the input turns out to be bad, what the command made there is gone again.

    Only what is noted goes: other programs may write into the directory meanwhile.

    Args:
        directory: need not exist.
        unless: a name in it that is worth keeping: once it is there, nothing is deleted.

    Yields:
        A function that notes a path which the command is about to make, and returns it. One that is there already is
        not the command's, unless it has just been `made`. Directories are deleted where they are empty, so what is made
        in them is noted as well.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
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
            ownership.remove([*reversed(noted), *made])
        raise


def json_object(text: str, flag: str) -> dict[str, Any] | None:
    """The JSON object that a flag gives; None of nothing.

    Raises:
        ValueError: it is none; names the flag.
    """
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
    """Finds out whether a file could be written, without making it or its directories.

    Raises:
        ValueError: a parent is a file, or nothing may be written there; names the flag.
    """
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise ValueError(f"{flag}: {there} is a file; name a path below a directory")
    if not os.access(path if path.exists() else there, os.W_OK):
        raise ValueError(f"{flag}: {path if path.exists() else there} may not be written to; name another place")


def code_of(error: Exception) -> int:
    """The exit code of an error."""
    if (code := getattr(error, "exit_code", None)) is not None:
        return code
    if isinstance(error, OSError) and error.errno in MACHINE:
        return exits.FAILED
    return exits.BAD_INPUT if isinstance(error, INPUT) else exits.FAILED


def expected(error: Exception) -> bool:
    """Whether its text alone says what happened."""
    return isinstance(error, (*INPUT, RuntimeError, MemoryError)) or hasattr(error, "exit_code")


def paragraph(error: Exception) -> str:
    """An error's text without blank lines and secrets."""
    text = str(error.args[0]) if isinstance(error, flags.Error) and error.args else str(error)
    if isinstance(error, MemoryError):
        text = (
            f"this machine's memory is used up{f' ({text})' if text else ''}; give the process more, or it less to do"
        )
    return passwords.masked(re.sub(r"\n\s*\n", "\n", text.strip()) or type(error).__name__)

"""What becomes of errors: exit codes, one paragraph, --debug, error.log, and what is left on disk."""

import errno
import os
import subprocess
import sys

import pytest
from absl import app, flags

from rmjax.checkpoint import CheckpointError
from rmjax.runtime import command_line, exits, ownership


class Unforeseen(Exception):
    """What no command expects."""


def outcome_of(error, **arguments):
    with pytest.raises(SystemExit) as stop, command_line.outcome(**arguments):
        raise error
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *((kind("x"), 2) for kind in (ValueError, FileNotFoundError, PermissionError, flags.Error, app.UsageError)),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), 2),
        (CheckpointError("broken"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError(errno.EIO, "Input/output error"), 1),
        (RuntimeError("the step failed"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_whose_error_it_is(error, code, capsys):
    assert outcome_of(error) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said and (said.startswith("error: ") or code == 130)


def test_an_error_under_way_is_the_runs_unless_it_says_otherwise():
    def raised(error):
        with command_line.under_way():
            raise error

    for error in (ValueError("x"), FileNotFoundError("x"), CheckpointError("x")):
        with pytest.raises(type(error)) as caught:
            raised(error)
        assert command_line.code_of(caught.value) == exits.FAILED
    with pytest.raises(exits.InputError) as caught:
        raised(exits.InputError("no such metric"))
    assert command_line.code_of(caught.value) == exits.BAD_INPUT
    assert command_line.code_of(CheckpointError("x")) == exits.BAD_INPUT


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path):
    ownership.write_marker(tmp_path, "run", "id")
    with pytest.raises(Unforeseen), command_line.outcome(log=tmp_path / "error.log"):
        raise Unforeseen
    assert "Unforeseen" in (tmp_path / "error.log").read_text()


def test_debug_shows_the_traceback_and_changes_no_code(capsys):
    assert outcome_of(ValueError("one\n\n\ntwo\n"), debug=True) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("\nerror: one\ntwo\n")


def test_only_a_failed_run_leaves_its_traceback(tmp_path, capsys):
    log = tmp_path / "error.log"
    outcome_of(ValueError("x"), log=log)
    assert not log.exists()
    outcome_of(RuntimeError("x"), log=log)
    assert not log.exists()  # the folder is somebody else's
    ownership.write_marker(tmp_path, "run", "id")
    outcome_of(RuntimeError("x"), log=log)
    assert "RuntimeError: x" in log.read_text() and str(log) in capsys.readouterr().err
    outcome_of(RuntimeError("x"), log=tmp_path / "none" / "error.log")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("there", [False, True])
def test_bad_input_leaves_nothing_and_a_failure_what_it_wrote(there, tmp_path):
    directory = tmp_path / "a" / "b"
    if there:
        directory.mkdir(parents=True)
        (directory / "mine").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for error in (ValueError("x"), RuntimeError("x")):
        with pytest.raises(type(error)), command_line.leaving_nothing(directory) as note:
            note(directory / "new").mkdir()
            note(directory / "new" / "file").write_text("y")
            note(directory / "mine")  # where it is there already, it is not the command's
            raise error
        assert (sorted(tmp_path.rglob("*")) == before) == isinstance(error, ValueError)


def test_what_other_programs_write_meanwhile_stays(tmp_path):
    with pytest.raises(ValueError), command_line.leaving_nothing(tmp_path / "run") as note:
        note(tmp_path / "run" / "ours").write_text("x")
        note(tmp_path / "run" / "folder").mkdir()
        (tmp_path / "run" / "folder" / "thesis").write_text("y")
        (tmp_path / "run" / "thesis").write_text("y")
        raise ValueError
    left = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*"))
    assert left == ["folder", "folder/thesis", "thesis"]


def test_what_is_worth_keeping_stays(tmp_path):
    with pytest.raises(ValueError), command_line.leaving_nothing(tmp_path / "run", unless="checkpoints") as note:
        note(tmp_path / "run" / "checkpoints").mkdir()
        note(tmp_path / "run" / "config.json").write_text("{}")
        raise ValueError
    assert len(list((tmp_path / "run").iterdir())) == 2


def test_a_place_that_cannot_be_written_to_is_refused_without_making_it(tmp_path):
    (tmp_path / "file").write_text("x")
    command_line.check_writable(tmp_path / "new" / "deep" / "x.json", "--json")
    with pytest.raises(ValueError, match=r"--json: .*file is a file"):
        command_line.check_writable(tmp_path / "file" / "x.json", "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_used_up_memory_is_a_paragraph(capsys):
    with pytest.raises(SystemExit) as stop, command_line.outcome():
        raise MemoryError
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: this machine's memory is used up")


HELP = [*("main", "evaluate", "score", "export", "serve", "benchmark"), "data"]
HELP += [f"data {command}" for command in ("inspect", "convert", "split", "audit")]


@pytest.mark.parametrize("flag", ["--help", "--helpfull", "--helpshort"])
def test_help_is_no_failure(flag):
    """In one process a flag, which imports each command."""
    program = (
        "import os, runpy, sys\n"
        "for command in sys.argv[2:]:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        module, *more = command.split()\n"
        "        sys.argv = [module, *more, sys.argv[1]]\n"
        "        runpy.run_module(f'rmjax.{module}', run_name='__main__', alter_sys=True)\n"
        "    print(command, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", program, flag, *HELP]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert [line for line in done.stderr.splitlines() if line.split()[0] in HELP] == [f"{name} 0" for name in HELP]
    assert done.stdout.count("usage") + done.stdout.count("flags:") >= len(HELP)

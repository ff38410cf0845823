"""Runs commands of rmjax as a shell would, each in a fork of a process that has imported them all.

    python tests/fork_server.py < jobs > results

A line of `jobs` is a list of {"id", "module", "argv", "cwd"} in JSON; its answer is a line with a list of
{"id", "code", "out", "err"}. No JAX backend is started before the fork, whose threads would not be there after it.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback

MODULES = ("rmjax.main", "rmjax.score", "rmjax.data", "rmjax.benchmark")
IMPORTS = (
    *("rmjax.train", "rmjax.reward_model", "rmjax.data.command", "rmjax.data.auditing", "rmjax.data.audit_page"),
    *("rmjax.measured", "rmjax.score", "rmjax.main", "rmjax.benchmark", "sqlalchemy", "pandas", "safetensors"),
    *("pyarrow.compute", "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers"),
    *("orbax.checkpoint", "huggingface_hub.hf_file_system"),
)
SECONDS = 600  # of one command: a run among them takes two minutes on a busy machine
AT_ONCE = 2


def run(job: dict, out: int, err: int) -> None:
    """In the child: becomes the command."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(job["cwd"])
    signal.alarm(SECONDS)
    sys.argv = [job["module"], *job["argv"]]
    code = 0
    try:
        if job["module"] == "rmjax.data":
            sys.modules["rmjax.data.command"].main()
        else:
            sys.modules[job["module"]].cli()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_all(jobs: list[dict]) -> list[dict]:
    """Runs jobs, some of them at a time."""
    running: dict[int, tuple[dict, list]] = {}
    left, results = jobs[::-1], []
    while left or running:
        while left and len(running) < AT_ONCE:
            job, files = left.pop(), [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
            child = os.fork()
            if not child:
                run(job, *(file.fileno() for file in files))
            running[child] = job, files
        child, status = os.wait()
        job, files = running.pop(child)
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        code = os.waitstatus_to_exitcode(status)
        results.append({"id": job["id"], "code": code, "out": texts[0], "err": texts[1]})
    return results


def main() -> None:
    """Answers line after line, until there are no more."""
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(run_all(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

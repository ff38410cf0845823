"""The score command with a model of numbers, killed where a test says.

    python tests/scoring_fork.py < jobs > results

Each line of `jobs` is {"argv", "cwd", "spoil"} in JSON, and is run in a fork of this process, which has imported
everything; the answer is {"code", "out", "err"}. `spoil` is {"at": function, "when": "before" or "after", "call": n,
"signal": number}: the command gets the signal at the n-th call.
"""

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

IMPORTS = (
    "rmjax.score.__main__",
    "rmjax.inference.reward_model",
    "rmjax.runtime.signals",
    "rmjax.runtime.processes",
    "rmjax.train.writers",
    "rmjax.inference.contract",
)
ROWS = 4  # of a part
ASKED = "asked.txt"  # in the model's directory: every text that was scored


class Model:
    """Scores a response by its number: "answer 7" is 7. Counts what it was asked."""

    def __init__(self, log=None):
        self.asked, self.log, self.resolution = [], log, 0.0
        self.inference = SimpleNamespace(work=SimpleNamespace(computed=0, unshared=0))
        self.chat = SimpleNamespace(left_out=lambda conversation, tools: [])

    def values(self, conversations):
        """The numbers."""
        texts = [conversation[-1]["content"] for conversation in conversations]
        self.asked += texts
        if self.log:
            with open(self.log, "a") as file:
                file.writelines(f"{text}\n" for text in texts)
        return {"score": np.array([float(text.split()[-1]) for text in texts])}


def use_numbers():
    """The command finds the model of numbers in any directory, and makes small parts."""
    from rmjax.inference import reward_model
    from rmjax.jobs import job

    job.CHUNK = ROWS
    reward_model.load_checked = lambda path, **_: Model(Path(path) / ASKED)


def spoil(at, when, call, signal):
    """Has a function send a signal to its process."""
    from rmjax.inference import reward_model
    from rmjax.jobs import job

    owners = {"values": Model, "load_checked": reward_model, "write_rows": job, "join_parts": job, "unlink": Path}
    owner = owners.get(at, job.Job)
    real, calls = getattr(owner, at), [0]

    def spoiled(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and when == "before":
            die()
        result = real(*args, **kwargs)
        if calls[0] == call and when == "after":
            die()
        return result

    def die():
        os.kill(os.getpid(), signal)
        time.sleep(20)  # a signal that is listened to ends the process meanwhile

    setattr(owner, at, spoiled)


def become(job, out, err):
    """In the child: the command."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(job["cwd"])
    use_numbers()
    if job["spoil"]:
        spoil(**job["spoil"])
    sys.argv = ["score", *job["argv"]]
    code = 0
    try:
        sys.modules["rmjax.score.__main__"].cli()
    except SystemExit as stop:
        code = stop.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(job):
    """The outcome of one command."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            become(job, out.fileno(), err.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    return {"code": code, "out": texts[0], "err": texts[1]}


def main():
    """Answers line after line, until there are no more."""
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

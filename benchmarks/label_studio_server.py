"""Has two people label rmjax's tasks in a real Label Studio, over its API, and reads its export back.

    python benchmarks/label_studio.py --workdir=runs/label_studio

Needs an environment with Label Studio (`pip install label-studio`), which --python names or which is made in
WORKDIR/venv. Of made-up pairs it writes a project of preferences and one of ratings (`rmjax.data convert
--to=label_studio`), imports both, answers every task as two users, exports JSON, and compares the records that
rmjax reads with the answers: names, conversations, shares of votes and mean ratings. Exits with 1 if one differs.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SOURCE = "synthetic://pairs?n=12&seed=3"
USERS = {"first@example.com": "a" * 40, "second@example.com": "b" * 40}  # with their tokens
WORDS = ("left", "right", "tie")


class LabelStudio:
    """A server with a database of its own and two users."""

    def __init__(self, python: str, workdir: Path, timeout: float):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = str(Path(python).parent / "label-studio")
        env = os.environ | {"LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true", "COLLECT_ANALYTICS": "false"}
        env.pop("PYTHONPATH", None)
        more = [
            f"--data-dir={workdir / 'data'}",
            "--no-browser",
            "--agree-fix-sqlite",
            "--enable-legacy-api-token",
            "--password=secret",
        ]
        first, second = ([f"--username={name}", f"--user-token={token}"] for name, token in USERS.items())
        log = (workdir / "label_studio.log").open("a")
        options: dict[str, Any] = {"env": env, "stdout": log, "stderr": log}
        subprocess.run([command, "init", *more, *first], check=True, **options)
        start = [command, "start", *more, *second, f"--port={self.port}", "--internal-host=127.0.0.1"]
        self.process = subprocess.Popen(start, start_new_session=True, **options)
        end = time.monotonic() + timeout
        while not self.version():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Label Studio did not start; see {workdir / 'label_studio.log'}")
            time.sleep(1)

    def version(self) -> str:
        try:
            return self.ask("/api/version")["label-studio-os-package"]["version"]
        except urllib.error.HTTPError:
            raise
        except OSError:
            return ""

    def ask(self, path: str, body: Any = None, user: str = "first@example.com") -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Token {USERS[user]}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def labelled(self, directory: Path, answers: Any) -> list[Any]:
        """The JSON export of a project, once each user gave their answers to every task."""
        config, tasks = (directory / "config.xml").read_text(), json.loads((directory / "tasks.json").read_text())
        project = self.ask("/api/projects/", {"title": directory.name, "label_config": config})["id"]
        self.ask(f"/api/projects/{project}/import", tasks)
        there = self.ask(f"/api/tasks/?project={project}&page_size=1000&fields=all")["tasks"]
        assert len(there) == len(tasks), f"{len(there)} tasks of {len(tasks)}"
        for task in sorted(there, key=lambda task: task["id"]):
            for person, user in enumerate(USERS):
                result = answers(task["data"], person)
                self.ask(f"/api/tasks/{task['id']}/annotations/", {"result": result}, user)
        return self.ask(f"/api/projects/{project}/export?exportType=JSON&download_all_tasks=true")

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)


def number(data: dict[str, Any]) -> int:
    return int(data["rmjax"]["row"].rpartition(":")[2])


def word(data: dict[str, Any], person: int) -> str:
    """What a person says of a task: the two agree on some."""
    return WORDS[(number(data) * (person + 1)) % 3]


def stars(data: dict[str, Any], person: int, shown: int) -> int:
    return 1 + (number(data) + 2 * person + shown) % 5


def preference(data: dict[str, Any], person: int) -> list[Any]:
    choices = {"choices": [word(data, person)]}
    return [{"type": "choices", "from_name": "preference", "to_name": "prompt", "value": choices}]


def ratings(data: dict[str, Any], person: int) -> list[Any]:
    result = lambda n: {"from_name": f"quality_{n}", "to_name": f"response_{n}", "type": "rating"}
    return [{**result(n), "value": {"rating": stars(data, person, n)}} for n in (1, 2)]


def differences(path: Path, tasks: list[Any], rates: bool) -> list[str]:
    """What rmjax reads otherwise than it was written and answered."""
    from rmjax.data.reading import records

    before = {record.row: record for record in records(SOURCE)}
    after = {record.row: record for record in records(str(path), on_bad_row="error")}
    found = [] if before.keys() == after.keys() else [f"rows {sorted(after)}, expected {sorted(before)}"]
    for task in tasks:
        data = task["data"]
        row, order = data["rmjax"]["row"], data["rmjax"]["order"]
        if row not in after:
            continue
        record = after[row]
        if json.dumps(record.conversations) != json.dumps(before[row].conversations):
            found.append(f"{row}: other conversations")
        if rates:
            # One star stands for a score of 0: the scale is 0 to 4.
            mean = {order[n - 1]: np.mean([stars(data, person, n) - 1 for person in (0, 1)]) for n in (1, 2)}
            if list(record.attributes["quality"]) != [mean[0], mean[1]]:
                found.append(f"{row}: {record.attributes} is not {mean}")
            continue
        wins, ties = np.zeros((2, 2)), np.zeros((2, 2))
        for said in (word(data, person) for person in (0, 1)):
            if said == "tie":
                ties += [[0, 0.5], [0.5, 0]]
            else:
                better = order[WORDS.index(said)]
                wins[better, 1 - better] += 0.5
        if not (np.array_equal(record.wins, wins) and np.array_equal(record.ties, ties)):
            found.append(f"{row}: wins {record.wins.tolist()}, ties {record.ties.tolist()}, not {wins}, {ties}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a directory without a project of before")
    parser.add_argument("--python", default="", help="Python of an environment with Label Studio; default: makes one")
    parser.add_argument("--timeout", type=float, default=240, help="seconds in which it must start; default 240")
    args = parser.parse_args()
    workdir = args.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    python = args.python or str(workdir / "venv" / "bin" / "python")
    if not args.python and not Path(python).exists():
        venv.create(workdir / "venv", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "label-studio"], check=True)
    from rmjax.data import __main__ as data

    to = ["--to=label_studio"]
    asked = {"preference": ["--ask=preference"], "rating": ["--ask=rating", "--attributes=quality", "--scale=0,4"]}
    for name, more in asked.items():
        data.main(["convert", SOURCE, f"--output={workdir / name}", *to, *more])
    server = LabelStudio(python, workdir, args.timeout)
    found: list[str] = []
    try:
        version = server.version()
        for name, answers in (("preference", preference), ("rating", ratings)):
            export = server.labelled(workdir / name, answers)
            path = workdir / f"{name}.json"
            path.write_text(json.dumps(export))
            people = {note["completed_by"] for task in export for note in task["annotations"]}
            wrong = differences(path, export, name == "rating")
            print(
                f"Label Studio {version}: {name}, {len(export)} tasks, {len(people)} people: {len(wrong)} differences"
            )
            found += wrong
    finally:
        server.stop()
    print("\n".join(found))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

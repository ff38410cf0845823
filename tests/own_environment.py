"""Environments of their own, for packages that do not go into ours; only a release makes them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Of what runs there: neither our sources nor our lock.
ENV = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}


def python_with(directory: Path, *packages: str) -> str:
    """The Python of a new environment in a directory, with these packages."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = str(directory / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, env=ENV)
    return python


def run_with(directory: Path, packages: list[str], script: str, *arguments: Any) -> Any:
    """The JSON on the last line of what a script prints in a new environment that has rmjax and these packages."""
    command = [python_with(directory / "venv", str(ROOT), *packages), "-c", script, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=directory, env=ENV)
    assert done.returncode == 0
    return json.loads(done.stdout.splitlines()[-1])

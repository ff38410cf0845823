"""Environments of their own, for packages that do not go into ours; only a release makes them."""

import os
import subprocess
import sys
from pathlib import Path

# Of what runs there: neither our sources nor our lock.
ENV = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}


def python_with(directory: Path, *packages: str) -> str:
    """The Python of a new environment in a directory, with these packages."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = str(directory / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, env=ENV)
    return python

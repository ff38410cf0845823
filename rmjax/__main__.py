"""`rmjax COMMAND ...` or `python -m rmjax COMMAND ...`: the same as `python -m rmjax.COMMAND ...`.

    rmjax train --config=configs/bt_qwen7b.py --workdir=runs/7b
    rmjax score --model=runs/7b/export --input=rows.jsonl --output=scored.jsonl

Commands:

    train       trains a model and exports it (python -m rmjax.main)
    evaluate    measures a model on benchmarks and data sets
    score       scores the rows of a file
    sample      samples responses to the prompts of a file
    serve       answers requests over HTTP
    export      exports a checkpoint, or verifies an export
    data        converts, audits, splits and renders data
    benchmark   measures training speed

`rmjax COMMAND --help` shows the options of each.
"""

import importlib.metadata
import runpy
import sys
from collections.abc import Sequence

from rmjax.runtime import exits
from rmjax.suggestions import did_you_mean

MODULES = {"train": "rmjax.main"}
MODULES |= {name: f"rmjax.{name}" for name in ("evaluate", "score", "sample", "serve", "export", "data", "benchmark")}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names, with the others.

    Raises:
        SystemExit: with the command's exit code (exits.py); 2 where there is no such command.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(__doc__.strip())
        return
    if name == "--version":
        print(f"rmjax {importlib.metadata.version('rmjax')}")
        return
    if name not in MODULES:
        print(
            f"error: {name!r} is none of the commands {', '.join(MODULES)}{did_you_mean(name, MODULES)}",
            file=sys.stderr,
        )
        sys.exit(exits.BAD_INPUT)
    sys.argv = [f"rmjax {name}", *rest]
    runpy.run_module(MODULES[name], run_name="__main__")


if __name__ == "__main__":
    main()

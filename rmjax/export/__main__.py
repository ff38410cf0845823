"""Writes a Hugging Face directory that transformers, vLLM and SGLang load, with its score contract.

    python -m rmjax.export --run=runs/tiny --output=exports/tiny
    python -m rmjax.export --run=runs/tiny/checkpoints/120 --output=exports/tiny-120 --dtype=bfloat16 --max_shard_gb=2
    python -m rmjax.export --run=runs/7b --output=exports/7b --unit_std --push_to=OWNER/NAME
    python -m rmjax.export --verify exports/tiny

A run is its directory (the best checkpoint, or --step), or one of its checkpoints. --verify replays the golden rows of
an export's score contract: by our loader, by transformers (`pip install 'rmjax[verify]'`) and by vLLM where that is
installed; all in float32, to 1e-4. The contract then says by what it was verified.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rmjax.runtime import command_line
from rmjax.runtime.command_line import Parser


def parser() -> Parser:
    """The command's arguments."""
    made = command_line.parser("rmjax.export.write", __doc__)
    add = made.add_argument
    add("--run", default="", metavar="DIR", help="a run, or one of its checkpoints")
    add("--step", default="", metavar="STEP", help="of a run: best (default), last, or a number")
    add(
        "--output",
        default="",
        metavar="DIR",
        help="where the export goes; replaces an older one, keeps other files",
    )
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the weights")
    add("--max_shard_gb", type=float, default=5.0, metavar="GB", help="largest weight file; default 5")
    add("--unit_std", action="store_true", help="divides the head by the rewards' deviation on the validation set")
    add("--push_to", default="", metavar="OWNER/NAME", help="uploads the export to the Hugging Face Hub")
    add("--private", action="store_true", help="with --push_to: a new repository is private")
    add("--verify", default="", metavar="DIR", help="replays the score contract of an export instead")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; see command_line.py for what becomes of errors."""
    argv = sys.argv[1:] if argv is None else argv
    with command_line.outcome(debug="--debug" in argv, stopped="stopped; nothing was written"):
        args = parser().parse_args(argv)
        from rmjax.export import from_run, verify
        from rmjax.runtime import compile_cache

        compile_cache.keep_programs()
        if args.verify:
            print("\n".join(verify.verify(Path(args.verify))))
        else:
            print("\n".join(from_run.export_and_push(from_run.checked(args))))


if __name__ == "__main__":
    main()

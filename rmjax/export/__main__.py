"""Writes a Hugging Face directory that transformers, vLLM and SGLang load, with its score contract.

    python -m rmjax.export --run=runs/tiny --output=exports/tiny
    python -m rmjax.export --run=runs/tiny/checkpoints/120 --output=exports/tiny-120 --dtype=bfloat16 --max_shard_gb=2
    python -m rmjax.export --run=runs/7b --output=exports/7b --unit_std --push_to=OWNER/NAME
    python -m rmjax.export --average=exports/a,exports/b,exports/c --output=exports/average
    python -m rmjax.export --verify exports/tiny

--run takes the directory of a run (and exports its best checkpoint, or the one that --step names), or one of its
checkpoints. --average writes the average of the weights of exports that started from one base (WARM, arXiv:2401.12187).
--verify replays the golden rows of an export's score contract through rmjax, transformers
(the extra `verify`) and, where it is installed, vLLM. All compute in float32 and must agree to 1e-4. The
contract then records what verified it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rmjax.runtime import command_line
from rmjax.runtime.command_line import Parser

TEXTS = (  # flags that take a text: name, what it is, help
    ("run", "DIR", "directory of a run, or of one of its checkpoints"),
    ("step", "STEP", "checkpoint of the run to export: best (default), last, or its step number"),
    ("output", "DIR", "directory to write the export to; an older export is replaced, other files are kept"),
    ("push_to", "OWNER/NAME", "upload the export to this repository of the Hugging Face Hub"),
    ("average", "DIR,DIR[,DIR]", "exports whose weights are averaged, in place of --run"),
    ("verify", "DIR", "replay the score contract of the export in DIR instead of writing one"),
)
SWITCHES = (
    ("unit_std", "divide the head by the standard deviation of rewards on the validation set"),
    ("adapter", "write a PEFT adapter of the run's base (config.lora), in place of a whole model"),
    ("private", "make a new repository of --push_to private"),
)


def parser() -> Parser:
    command = command_line.parser("rmjax.export", __doc__)
    for name, metavar, text in TEXTS:
        command.add_argument(f"--{name}", default="", metavar=metavar, help=text)
    for name, text in SWITCHES:
        command.add_argument(f"--{name}", action="store_true", help=text)
    dtype = "number type of the exported weights; auto takes config.export.dtype of the run"
    command.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help=dtype)
    shard = "size of the largest weight file in GB; default 5"
    command.add_argument("--max_shard_gb", type=float, default=5.0, metavar="GB", help=shard)
    return command


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with command_line.outcome(debug="--debug" in argv, stopped="stopped; nothing was written"):
        args = parser().parse_args(argv)
        from rmjax.export import average, from_run, verify
        from rmjax.runtime import compile_cache

        compile_cache.keep_programs()
        if args.verify:
            print("\n".join(verify.verify(Path(args.verify))))
        elif args.average:
            print("\n".join(average.average(args)))
        else:
            print("\n".join(from_run.export_and_push(from_run.checked(args))))


if __name__ == "__main__":
    main()

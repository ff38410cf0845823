r"""Trains a reward model.

    python -m rmjax.main --config=configs/bt_tiny.py --workdir=runs/tiny
    python -m rmjax.main --config=configs/bt_qwen7b.py --config.model.init_from=PATH_OR_HUB_ID \
        --config.data.train=FILES --workdir=runs/7b
    ... --dry_run       audit, plan, parameters, sharding and compiled memory, without training

Every key of the config can be given as --config.KEY=VALUE; rmjax/config.py lists them. The same command continues a
run that was stopped.
"""

import difflib
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, e.g. configs/bt_tiny.py.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "", "Where metrics, checkpoints and the export go.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show audit, plan, sharding and compiled memory; train nothing.")


def main(argv: Sequence[str]) -> None:
    """Checks the command line and runs; an error is one paragraph, its traceback is in the workdir."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options are written --name=value")
    if CONFIG.value is None or not WORKDIR.value:
        raise app.UsageError("--config and --workdir are required")
    from rmjax import train  # here, so that --help and a mistyped flag answer at once

    logging.set_verbosity(logging.WARNING)
    workdir = Path(WORKDIR.value).expanduser().absolute()
    try:
        train.run(CONFIG.value, workdir, DRY_RUN.value)
    except (ValueError, OSError, train.NonFiniteError) as error:
        if CONFIG.value.debug:
            raise
        print(f"\nerror: {error}", file=sys.stderr)
        if workdir.is_dir():
            (workdir / "error.log").write_text(traceback.format_exc())
            print(f"(the traceback is in {workdir / 'error.log'})", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def cli() -> None:
    """Parses flags, names the nearest key of a mistyped one, and runs `main`."""
    app.run(main, flags_parser=parse)


def parse(argv: Sequence[str]) -> list[str]:
    """absl's flag parser with an error that names the nearest config key."""
    try:
        return flags.FLAGS(list(argv))
    except (flags.Error, KeyError, AttributeError, ValueError) as error:
        asked = [m[1] for a in argv if (m := re.match(r"--?config\.([\w.]+)", a))]
        from rmjax import config as config_lib

        keys = [key for key, _ in config_lib.flatten(config_lib.defaults())]
        wrong = [a for a in asked if a not in keys and not a.startswith("model.scratch.")]
        for key in wrong:
            near = difflib.get_close_matches(key, keys, 1, 0.5)
            hint = f"; did you mean --config.{near[0]}?" if near else ""
            print(f"error: there is no config key {key!r}{hint}", file=sys.stderr)
        if not wrong:
            print(f"error: {error.args[0] if error.args else error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()

"""Training: `run(config, workdir)` does what `python -m rmjax.main` does.

`training` is a whole run, `step` its compiled step, `optim` with `low_memory` and `host_state` the optimizers,
`resume` what a stopped run goes on from, `watch` and `writers` what people see of it, `finish` its end, and `dry_run`
a run without training.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`rmjax.train.run`, imported on first use so that parts of the package do not import all of it."""
    if name == "run":
        from rmjax.train.training import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

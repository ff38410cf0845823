"""One of several processes that load, save, restore and export a model; prints each phase's peak of its own memory.

    python tests/memory_of_phases.py MODEL TOKENIZER DIRECTORY

Counted is memory that only this process can hold (RssAnon and RssShmem of /proc/self/status): what JAX and numpy
allocate, the shards on the CPU's "devices" among it. Pages of mapped files are left out: the kernel shares them between
processes and takes them back at will.
"""

import json
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from rmjax.runtime import agreement, processes

SEQUENCES = [np.arange(5, 30), np.arange(40, 80)]


def held() -> int:
    """Bytes."""
    text = Path("/proc/self/status").read_text()
    return sum(int(re.search(rf"{name}:\s*(\d+) kB", text)[1]) * 1024 for name in ("RssAnon", "RssShmem"))


class Peaks(threading.Thread):
    """Measures all the time."""

    def __init__(self):
        super().__init__(daemon=True)
        self.of: dict[str, int] = {}
        self.phase = "start"

    def run(self):
        while True:
            self.of[self.phase] = max(self.of.get(self.phase, 0), held())
            time.sleep(0.002)


def main(model: str, tokenizer: str, directory: str) -> None:
    processes.start()
    import jax

    from rmjax import sharding
    from rmjax.batches.chat import Chat, load_tokenizer
    from rmjax.batches.trees import build_tree
    from rmjax.checkpoint import Checkpointer
    from rmjax.config import defaults
    from rmjax.export import write as export
    from rmjax.models import heads, hf
    from rmjax.models.config import from_hf
    from rmjax.objectives.bradley_terry import BradleyTerry

    values = hf.read_config(model)
    shape = from_hf(values)
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    _, shapes = heads.abstract(shape, 1, "float32", "float32")
    shapes = sharding.with_shardings(shapes, sharding.param_shardings(mesh, shapes))
    config = defaults()
    chat = Chat(load_tokenizer(tokenizer), max_length=256)
    trees = [build_tree([ids]) for ids in SEQUENCES]
    validation = SimpleNamespace(
        lengths=np.array(list(map(len, trees))), group=lambda i: SimpleNamespace(tree=trees[i])
    )
    peaks = Peaks()
    peaks.start()

    def phase(name: str) -> None:
        agreement.barrier(name)
        peaks.phase = name

    with jax.set_mesh(mesh):
        phase("load")
        params, _ = hf.load(model, shapes, shape, seed=0)
        phase("save")
        checkpointer = Checkpointer(Path(directory) / "checkpoints", keep_latest=1)
        checkpointer.save(1, {"params": params}, {}, None)
        checkpointer.close()
        phase("restore")
        del params
        state, _ = checkpointer.restore_step(1, {"params": shapes})
        phase("export")
        export.write_export(
            Path(directory) / "export",
            state.pop("params"),
            objective=BradleyTerry(),
            config=config,
            values=values,
            model=shape,
            chat=chat,
            metrics={},
            data="0",
            golden=export.golden_sequences(validation),
        )
        phase("end")
    print(json.dumps(peaks.of), file=sys.stderr)
    processes.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])

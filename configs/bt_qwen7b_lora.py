r"""Bradley-Terry from Qwen2.5-7B-Instruct with adapters (LoRA): `bt_qwen7b.py` on one card.

    python -m rmjax.main --config=configs/bt_qwen7b_lora.py --workdir=runs/qwen7b_lora

The base is frozen in the compute dtype; adapters of rank 32 on every kernel of the layers and the score head are
trained. The export is a whole model into which they are merged; with --config.export.adapter=True it is a PEFT
directory.

Hardware: 1 A100 of 40 GB (--topology=a100_40gb:1) or 1 TPU v6e (--topology=v6e:1x1).
Memory by the compiler's account, 2026-11-30: 22.97 of 39.39 GiB on the A100.
Hours (an estimate from FLOPs, not measured): 80,000 pairs x about 1,200 tokens x 5 x 6.5e9 (no gradients of the frozen
kernels, some recomputed) is 3.1e18; at 40 % of 312 TFLOP/s seven hours on one A100.
Score to expect: near that of `bt_qwen7b.py` by what others report of adapters on all layers, not measured here.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of bt_qwen7b.py with what differs; takes no argument."""
    config = runpy.run_path(str(Path(__file__).with_name("bt_qwen7b.py")))["get_config"](arg)
    config.lora.rank = 32
    config.optim.learning_rate = 1e-4
    return config

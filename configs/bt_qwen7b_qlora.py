r"""Bradley-Terry from Qwen2.5-7B-Instruct with adapters on a base in 4 bits (QLoRA): a small card is enough.

    python -m rmjax.main --config=configs/bt_qwen7b_qlora.py --workdir=runs/qwen7b_qlora

The kernels of the base are kept as nf4 (4.5 bits a number, Dettmers et al. 2023) and read into the compute dtype where
they are used. The export is a whole model: the base as it was read back from 4 bits, with the adapters merged.

Hardware: 1 GPU of 24 GB (--topology=l4:1, --topology=rtx4090:1) or 1 TPU v6e (--topology=v6e:1x1).
Hours (an estimate from FLOPs, not measured): 3.7e18 as `bt_qwen7b_lora.py`; at 30 % of 165 TFLOP/s (RTX 4090) 21 hours.
Score to expect: near that of `bt_qwen7b_lora.py`, not measured.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of bt_qwen7b_lora.py with what differs; takes no argument."""
    config = runpy.run_path(str(Path(__file__).with_name("bt_qwen7b_lora.py")))["get_config"](arg)
    config.lora.base = "nf4"
    return config

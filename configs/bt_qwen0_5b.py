r"""Bradley-Terry from Qwen2.5-0.5B-Instruct: `bt_qwen7b.py` on one accelerator, to try data and settings.

    python -m rmjax.main --config=configs/bt_qwen0_5b.py --workdir=runs/qwen0_5b

Hardware: 1 A100 (--topology=a100:1) or 1 TPU v6e (--topology=v6e:1x1), or another accelerator of 32 GB or more.
Hours (an estimate from FLOPs, not measured): 80,000 pairs x about 1,200 tokens x 8 x 0.36e9 FLOP = 2.8e17, at 25 % of
989 TFLOP/s about twenty minutes on one H100.
Score to expect (an estimate, not measured): validation accuracy 78 to 84 %.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of bt_qwen7b.py with what differs; takes no argument."""
    config = runpy.run_path(str(Path(__file__).with_name("bt_qwen7b.py")))["get_config"](arg)
    config.model.init_from = "Qwen/Qwen2.5-0.5B-Instruct"
    config.optim.learning_rate = 1e-5
    return config

r"""Bradley-Terry from Gemma-3-12b-it on Skywork-Reward-Preference-80K-v0.2: `bt_qwen7b.py` with another base.

    python -m rmjax.main --config=configs/bt_gemma3_12b.py --workdir=runs/gemma3

The checkpoint is multimodal: its text model is loaded, the vision tower is not, and the export is a text model. Five of
six layers see 1,024 tokens.

Hardware: 8 H100 (--topology=h100:8) or 8 TPU v5p (--topology=v5p:2x2x2); parameters, gradients and moments are float32
(16 bytes a parameter, 24 GB a device).
Hours (an estimate from FLOPs, not measured): 80,000 pairs x about 1,200 tokens x 8 x 10.8e9 (full recompute) is 8.3e18;
at 40 % of 8 x 989 TFLOP/s 45 minutes on 8 H100; with start-up, evaluation and saving one and a quarter hours.
Score to expect: not known.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of bt_qwen7b.py with another base; takes no argument."""
    config = runpy.run_path(str(Path(__file__).with_name("bt_qwen7b.py")))["get_config"](arg)
    config.model.init_from = "google/gemma-3-12b-it"
    return config

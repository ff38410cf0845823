r"""Bradley-Terry from Gemma-2-9b-it on Skywork-Reward-Preference-80K-v0.2: `bt_qwen7b.py` with another base.

    python -m rmjax.main --config=configs/bt_gemma2_9b.py --workdir=runs/gemma2

Gemma 2 knows no system message: rows that have one are refused by its template, and counted. Its context is 8,192
tokens, of which half of its layers see 4,096.

Hardware: 8 H100 (--topology=h100:8) or 8 TPU v5p (--topology=v5p:2x2x2); parameters, gradients and moments are float32
(16 bytes a parameter, 18 GB a device).
Hours (an estimate from FLOPs, not measured): 80,000 pairs x about 1,200 tokens x 8 x 8.3e9 (full recompute) is 6.4e18;
at 40 % of 8 x 989 TFLOP/s 35 minutes on 8 H100; with start-up, evaluation and saving about one hour.
Score to expect (not measured here; Skywork-Reward-Gemma-2-27B-v0.2, three times as large, reports 94 % on RewardBench):
above 90 %.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of bt_qwen7b.py with another base; takes no argument."""
    config = runpy.run_path(str(Path(__file__).with_name("bt_qwen7b.py")))["get_config"](arg)
    config.model.init_from = "google/gemma-2-9b-it"
    return config

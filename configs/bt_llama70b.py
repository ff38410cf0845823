r"""Bradley-Terry from Llama-3.3-70B-Instruct on Skywork-Reward-Preference-80K-v0.2: `bt_qwen7b.py`, ten times larger.

    python -m rmjax.main --config=configs/bt_llama70b.py --workdir=/shared/runs/llama70b
    ... --dry_run --topology=h100:64     what it needs and how long it takes at least, on any machine

Hardware: 64 H100 (--topology=h100:64) or 64 TPU v5p (--topology=v5p:4x4x4), started by a script of launch/ on every
host, with a workdir that all of them see. Parameters, gradients and moments are float32: 16 bytes for each of 69.5
billion parameters are 17.4 GB on each of 64 devices, so bfloat16 would save nothing that is needed. On 8 H200
(--topology=h200:8) it is, rounded stochastically so that small updates are not lost: --config.plan.rows_per_step=32
--config.model.param_dtype=bfloat16 --config.optim.mu_dtype=bfloat16 --config.optim.nu_dtype=bfloat16.
Hours (an estimate from FLOPs, not measured): 80,000 pairs x about 1,200 tokens x 8 x 69.5e9 (full recompute) is 5.3e19;
at 40 % of 64 x 989 TFLOP/s 35 minutes on 64 H100, of 64 x 459 TFLOP/s 75 on v5p; with start-up, evaluation and saving
one and a half to two.
Disk: 141 GB of weights to read; a checkpoint has 834 GB, and at most two are kept.
Score to expect (from what others report for this size and similar data, not measured here): RewardBench 93 to 95 %.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of bt_qwen7b.py with what differs; takes no argument."""
    config = runpy.run_path(str(Path(__file__).with_name("bt_qwen7b.py")))["get_config"](arg)
    config.model.init_from = "meta-llama/Llama-3.3-70B-Instruct"

    # A row for each of 64 devices: about 215 pairs. Rows of 8,192 tokens would be twice as many.
    config.plan.row_tokens = 4096
    config.plan.rows_per_step = 64

    config.optim.learning_rate = 1e-6

    config.eval.every = "25%"
    config.checkpoint.keep_latest = 1
    return config

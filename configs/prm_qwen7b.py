r"""Process rewards from Qwen2.5-7B-Instruct on Math-Shepherd: is each step of a solution right.

    python -m rmjax.main --config=configs/prm_qwen7b.py --workdir=runs/math_shepherd
    ... --config.data.train='hf://datasets/trl-lib/prm800k/data/train-*.parquet' \
        --config.data.validation='hf://datasets/trl-lib/prm800k/data/test-*.parquet'

Hardware: 8 H100 (--topology=h100:8) or 8 TPU v5p (--topology=v5p:2x2x2); parameters, gradients and moments are float32
(16 bytes a parameter, 14 GB a device). All CPU cores tokenize the 420,000 solutions before the first step.
Hours (an estimate from FLOPs, not measured): 422,422 solutions x about 300 tokens x 8 x 6.5e9 (full recompute) is
6.6e18; at 40 % of 8 x 989 TFLOP/s 35 minutes on 8 H100; with start-up, tokenizing, evaluation and saving about one and
a half.
Score to expect (a guess, not measured): validation accuracy of steps about 85 %, first_error_accuracy about 65 %. The
labels are estimated by sampling continuations, not by people, so neither gets near 100 %.
"""

from ml_collections import ConfigDict

from rmjax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    config = defaults("prm")
    config.duration = "1 epoch"

    config.model.init_from = "Qwen/Qwen2.5-7B-Instruct"

    config.data.train = "hf://datasets/trl-lib/math_shepherd/data/train-*.parquet"
    config.data.validation = "hf://datasets/trl-lib/math_shepherd/data/test-*.parquet"

    config.plan.row_tokens = 8192
    config.plan.groups_per_step = 256

    config.optim.learning_rate = 2e-6
    return config

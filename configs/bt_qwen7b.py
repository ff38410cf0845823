r"""Bradley-Terry from Qwen2.5-7B-Instruct on Skywork-Reward-Preference-80K-v0.2: a general reward model.

    python -m rmjax.main --config=configs/bt_qwen7b.py --workdir=runs/qwen7b
    ... --config.model.init_from=/models/Qwen2.5-7B-Instruct --config.data.train='/data/skywork/*.parquet'

What else the data may say (see BradleyTerry): strengths of the preferences (a `margin` or `preference_strength` column,
as HelpSteer2 has) with --config.objective.scaled=True or .margin_scale=1.0; ties with .ties=half, or as an outcome of
their own with .ties=davidson, whose parameter needs a learning rate of its own here:
config.optim.lr_factors = ((r"objective/.*", 1000.0), (r".*", 1.0)); rankings with .rankings=plackett_luce.

Hardware: 8 H100 (--topology=h100:8) or 8 TPU v5p (--topology=v5p:2x2x2); parameters, gradients and moments are float32
(16 bytes a parameter, 14 GB a device).
Hours (an estimate from FLOPs, not measured): 80,000 pairs x about 1,200 tokens x 8 x 6.5e9 (full recompute) is 5e18;
at 40 % of 8 x 989 TFLOP/s half an hour on 8 H100; with start-up, evaluation and saving about one.
Score to expect (from what others report for this data and size, not measured here): RewardBench about 90 %, validation
accuracy about 90 %.
"""

from ml_collections import ConfigDict

from rmjax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    config = defaults()
    config.duration = "1 epoch"

    config.model.init_from = "Qwen/Qwen2.5-7B-Instruct"

    config.data.train = "hf://datasets/Skywork/Skywork-Reward-Preference-80K-v0.2/data/*.parquet"
    config.data.validation_fraction = 0.02

    config.plan.row_tokens = 8192
    config.plan.groups_per_step = 128

    config.optim.learning_rate = 2e-6
    return config

r"""Pairwise judging from Qwen2.5-7B-Instruct on HelpSteer3's preferences: which of two responses is better, or a tie.

    python -m rmjax.main --config=configs/pairwise_qwen7b.py --workdir=runs/pairwise_qwen7b
    ... --config.data.train='/data/helpsteer3/preference/train.jsonl.gz' \
        --config.data.validation='/data/helpsteer3/preference/validation.jsonl.gz'

Hardware: 8 H100 (--topology=h100:8) or 8 TPU v5p (--topology=v5p:2x2x2); parameters, gradients and moments are float32
(16 bytes a parameter, 14 GB a device).
Hours (an estimate from FLOPs, not measured): 38,459 pairs x about 4,000 tokens (the conversation once, both responses
twice) x 8 x 6.5e9 (full recompute) is 8e18; at 40 % of 8 x 989 TFLOP/s 42 minutes on 8 H100; with start-up, evaluation
and saving about one hour.
Score to expect (an estimate, not measured here): about 70 % of the verdicts, averaged over both orders, since the
annotators themselves disagree and a tie is hard to tell from a slight preference; 90 % of the pairs decided alike in
both orders.

HelpSteer3's strengths are 1 (slightly better), 2 and 3 (much better): soft labels, of which a slight preference keeps
0.73 and leaves the rest to the tie.
"""

from ml_collections import ConfigDict

from rmjax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    config = defaults("pairwise")
    config.duration = "1 epoch"

    config.model.init_from = "Qwen/Qwen2.5-7B-Instruct"

    config.data.train = "hf://datasets/nvidia/HelpSteer3/preference/train.jsonl.gz"
    config.data.validation = "hf://datasets/nvidia/HelpSteer3/preference/validation.jsonl.gz"
    config.data.max_length = 8192

    config.plan.row_tokens = 16384
    config.plan.groups_per_step = 128

    config.objective.strength = "soft"

    config.optim.learning_rate = 2e-6
    return config

"""Public data sets by name: where each lies on the hub, and the format that reads it.

A source may be given to a run or to `python -m rmjax.data convert` as it stands here. Licences are the sets' own.
"""

from typing import NamedTuple


class PublicSet(NamedTuple):
    """A public data set.

    Attributes:
        source: for config.data.train.
        format: for config.data.format; detection finds the same.
    """

    source: str
    format: str


CONVERSIONS = {
    "helpsteer2": PublicSet("hf://datasets/nvidia/HelpSteer2/train.jsonl.gz", "scored_text"),
    "helpsteer2_preference": PublicSet(
        "hf://datasets/nvidia/HelpSteer2/preference/preference.jsonl.gz", "strength_pair"
    ),
    "helpsteer3_preference": PublicSet("hf://datasets/nvidia/HelpSteer3/preference/train.jsonl.gz", "strength_chat"),
    "ultrafeedback": PublicSet("hf://datasets/openbmb/UltraFeedback/*.jsonl", "ultrafeedback"),
    "ultrafeedback_binarized": PublicSet(
        "hf://datasets/HuggingFaceH4/ultrafeedback_binarized/data/train_prefs-*.parquet", "pair_messages"
    ),
    "hh-rlhf": PublicSet("hf://datasets/Anthropic/hh-rlhf/h*/train.jsonl.gz", "pair_transcript"),
    "skywork": PublicSet("hf://datasets/Skywork/Skywork-Reward-Preference-80K-v0.2/data/*.parquet", "pair_messages"),
    "nectar": PublicSet("hf://datasets/berkeley-nest/Nectar/data/rlaif.parquet", "ranked_answers"),
    "math_shepherd": PublicSet("hf://datasets/peiyi9979/Math-Shepherd/math-shepherd.jsonl", "shepherd_text"),
    "math_shepherd_trl": PublicSet("hf://datasets/trl-lib/math_shepherd/data/train-*.parquet", "stepwise"),
    "prm800k_trl": PublicSet("hf://datasets/trl-lib/prm800k/data/train-*.parquet", "stepwise"),
}

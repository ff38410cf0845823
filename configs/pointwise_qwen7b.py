r"""Pointwise from Qwen2.5-7B-Instruct on HelpSteer2: its five attributes, from 0 to 4, and their weighted sum.

    python -m rmjax.main --config=configs/pointwise_qwen7b.py --workdir=runs/helpsteer2
    ... --config.objective.loss=hl_gauss --config.checkpoint.metric=validation/pearson --config.checkpoint.mode=max

Hardware: 8 H100 (--topology=h100:8) or 8 TPU v5p (--topology=v5p:2x2x2); parameters, gradients and moments are float32
(16 bytes a parameter, 14 GB a device).
Hours (an estimate from FLOPs, not measured): 20,324 responses x about 650 tokens x 2 epochs x 8 x 6.5e9 (full
recompute) is 1.4e18; at 40 % of 8 x 989 TFLOP/s under ten minutes on 8 H100; with start-up, evaluation and saving about
half an hour. Host memory and CPU cores are no limit here.
Score to expect (a guess, not measured): Pearson about 0.6 for helpfulness and correctness and more for verbosity on the
1,038 validation responses; less for coherence, which is 4 for most of them.

The weights are those that the model card of Nemotron-4-340B-Reward, which was trained on these data, recommends.
"""

from ml_collections import ConfigDict

from rmjax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    config = defaults("pointwise")
    config.duration = "2 epochs"

    config.model.init_from = "Qwen/Qwen2.5-7B-Instruct"

    config.data.train = "hf://datasets/nvidia/HelpSteer2/train.jsonl.gz"
    config.data.validation = "hf://datasets/nvidia/HelpSteer2/validation.jsonl.gz"

    config.plan.row_tokens = 8192
    config.plan.groups_per_step = 64

    config.objective.attributes = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    config.objective.weights = (0.3, 0.74, 0.46, 0.47, -0.33)

    config.optim.learning_rate = 2e-6
    return config

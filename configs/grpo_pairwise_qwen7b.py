r"""A judge that thinks and then prefers, by reinforcement: Qwen3-8B on HelpSteer3's preferences, A, B or a tie.

    python -m rmjax.main --config=configs/grpo_pairwise_qwen7b.py --workdir=runs/grpo_pairwise
    ... --config.data.train='/data/helpsteer3/preference/train.jsonl.gz' \
        --config.data.validation='/data/helpsteer3/preference/validation.jsonl.gz'

For each of 64 pairs of a step 4 answers are drawn to each order: a thought, and `<better>A</better>`. All 8 are one
group, whose beginnings are computed once. The reward is 1 for the right verdict; an answer that cannot be read earns
nothing. How much better the preferred response is (1 to 3 in HelpSteer3) reaches a reward of your own as
`answer.strength` (rmjax/judging/rewards.py).

Hardware: 8 H100 (--topology=h100:8) or 8 TPU v5p (--topology=v5p:2x2x2); parameters, gradients and moments are float32
(16 bytes a parameter, 16 GB a device), the sampler's parameters bfloat16 on each device (16 GB).
Hours (an estimate, not measured): an epoch is 601 steps of 512 answers of about 700 tokens, 0.36 million tokens a step,
and prompts of about 2,000 tokens, each read once. At 1,500 tokens a second and device, which NeMo-RL publishes for
whole steps of an 8B model on H100, a step takes 30 s and the run about five hours.
Score to expect (an estimate, not measured): about 70 % of the verdicts, since the annotators themselves disagree and a
tie is hard to tell from a slight preference; 85 % of the pairs decided alike in both orders.
"""

from ml_collections import ConfigDict

from rmjax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    config = defaults("grpo")
    config.duration = "1 epoch"

    config.model.init_from = "Qwen/Qwen3-8B"

    config.data.train = "hf://datasets/nvidia/HelpSteer3/preference/train.jsonl.gz"
    config.data.validation = "hf://datasets/nvidia/HelpSteer3/preference/validation.jsonl.gz"
    config.data.max_length = 6144

    config.plan.row_tokens = 16384

    config.rollout.prompts_per_step = 64
    config.rollout.samples = 4
    config.rollout.max_tokens = 2048

    config.optim.learning_rate = 1e-6
    config.optim.schedule = "constant"
    config.optim.warmup = "10 steps"

    config.eval.samples = 4
    config.gate.accuracy = 0.6
    return config

r"""A judge that thinks and then rates, by reinforcement: Qwen3-8B on HelpSteer2's helpfulness, from 0 to 4.

    python -m rmjax.main --config=configs/grpo_pointwise_qwen7b.py --workdir=runs/grpo_pointwise
    ... --config.data.train='/data/helpsteer2/train.jsonl.gz' \
        --config.data.validation='/data/helpsteer2/validation.jsonl.gz'

For each of 96 questions of a step 8 answers are drawn: a thought, and `<score>3</score>`. The reward is 1 at the label,
and 0 at the other end of the scale (`closeness`); an answer that cannot be read earns nothing.

Hardware: 8 H100 (--topology=h100:8) or 8 TPU v5p (--topology=v5p:2x2x2); parameters, gradients and moments are float32
(16 bytes a parameter, 16 GB a device), the sampler's parameters bfloat16 on each device (16 GB).
Hours (an estimate, not measured): 2 epochs are 423 steps of 768 answers of about 600 tokens, 0.46 million tokens a
step. At 1,500 tokens a second and device, which NeMo-RL publishes for whole steps of an 8B model on H100, a step takes
40 s and the run under five hours.
Score to expect (an estimate, not measured): one sampled rating in two as the annotators' mean rounds, and a rank
correlation of the mean of 8 of 0.5 to 0.6.
"""

from ml_collections import ConfigDict

from rmjax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    config = defaults("grpo")
    config.duration = "2 epochs"

    config.model.init_from = "Qwen/Qwen3-8B"

    config.data.train = "hf://datasets/nvidia/HelpSteer2/train.jsonl.gz"
    config.data.validation = "hf://datasets/nvidia/HelpSteer2/validation.jsonl.gz"

    config.plan.row_tokens = 16384

    config.objective.target = "score"
    config.objective.attributes = ("helpfulness",)
    config.objective.scale = (0.0, 4.0)

    config.rollout.prompts_per_step = 96
    config.rollout.samples = 8
    config.rollout.max_tokens = 2048

    config.optim.learning_rate = 1e-6
    config.optim.schedule = "constant"
    config.optim.warmup = "10 steps"

    config.checkpoint.metric, config.checkpoint.mode = "validation/spearman", "max"
    config.gate.accuracy = 0.4
    return config

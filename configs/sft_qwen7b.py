r"""A judge that writes ratings, from Qwen2.5-7B-Instruct on HelpSteer2: five attributes of a response, from 0 to 4.

    python -m rmjax.main --config=configs/sft_qwen7b.py --workdir=runs/sft_qwen7b
    ... --config.data.train='/data/helpsteer2/train.jsonl.gz' \
        --config.data.validation='/data/helpsteer2/validation.jsonl.gz'

The export is a language model (CausalLM): shown a conversation and a response by the packaged question
(data/templates/judge_score.jinja), it writes `<helpfulness>3</helpfulness>` and four lines more.

Hardware: 8 H100 (--topology=h100:8) or 8 TPU v5p (--topology=v5p:2x2x2); parameters, gradients and moments are float32
(16 bytes a parameter, 14 GB a device).
Hours (an estimate from FLOPs, not measured): 2 epochs of 20,324 responses x about 900 tokens x 8 x 6.5e9 (full
recompute; the output embedding is computed for the answers alone, 5 % of the tokens) is 1.9e18; at 40 % of
8 x 989 TFLOP/s ten minutes on 8 H100; with start-up, evaluation and saving about half an hour.
Score to expect (an estimate, not measured): 15 to 25 % of the responses with all five ratings as the annotators' means
round, since each alone is right about two times in three.
"""

from ml_collections import ConfigDict

from rmjax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    config = defaults("sft")
    config.duration = "2 epochs"

    config.model.init_from = "Qwen/Qwen2.5-7B-Instruct"

    config.data.train = "hf://datasets/nvidia/HelpSteer2/train.jsonl.gz"
    config.data.validation = "hf://datasets/nvidia/HelpSteer2/validation.jsonl.gz"

    config.plan.row_tokens = 8192
    config.plan.groups_per_step = 128

    config.objective.target = "score"
    config.objective.attributes = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    config.objective.scale = (0.0, 4.0)

    config.optim.learning_rate = 5e-6

    config.checkpoint.metric, config.checkpoint.mode = "validation/verdict_accuracy", "max"
    return config

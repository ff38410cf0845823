"""The demo of pairwise judging: A, B or tie, from scratch on generated verdicts; no network, no download.

    python -m rmjax.main --config=configs/pairwise_tiny.py --workdir=runs/pairwise_tiny

Hardware: any CPU; here 2 cores.
Hours: 0.03 (85 seconds on one core of an Intel Xeon at 2.50 GHz, 2026-11-28, with data read before and no report).
Score (validation, 600 pairs, both orders averaged): accuracy 32 % before training and 95 % after it, with both orders
deciding alike for 100 % of the pairs; three other seeds (`--config.seed`) end at 95 %, with 98 to 100 % alike.
Best reachable: 95 %, because 3 verdicts of 60 are wrong. Baselines: 33 % for any one verdict, 29 % for the longer reply
(equally long is a tie), below 38 % for a decision tree over both lengths, below 39 % for a linear model of the words.

The better reply has the word that the prompt names; if neither has it, it is a tie (rmjax/data/synthetic/verdicts.py).
"""

from ml_collections import ConfigDict

from rmjax.config import demo

# The packaged question is long for a tokenizer that knows few words, and a model this small has to tell two replies
# apart by marks that stand nowhere else.
TEMPLATE = "{{ prompt }}\n1: {{ response_a }}\n2: {{ response_b }}"


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    config = demo("pairwise")
    config.duration = "2 epochs"

    config.data.train = "synthetic://verdicts?n=16000&seed=0"
    config.data.validation = "synthetic://verdicts?n=600&seed=1"

    config.plan.groups_per_step = 32

    config.objective.template = TEMPLATE

    config.optim.learning_rate = 2e-3
    return config

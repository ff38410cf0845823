"""The demo of pairwise judging: A, B or tie, from scratch on generated verdicts; no network, no download.

    python -m rmjax.main --config=configs/pairwise_tiny.py --workdir=runs/pairwise_tiny

Hardware: any CPU; here 2 cores.
Hours: 0.04 (81 seconds of training, with evaluations, and 156 in all on 2 busy cores of an AMD EPYC, 2026-11-29).
Score (validation, 600 pairs, both orders averaged): accuracy 34 % before training and 95 % after it, with both orders
deciding alike for 99.5 % of the pairs; another seed (`--config.seed=1`) ends at 94.7 %, with 99.5 % alike.
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

    # Two heads learn late which of the replies a word is in, unless most of what they rotate turns within a text.
    config.model.scratch.rope_theta = 100.0
    return config

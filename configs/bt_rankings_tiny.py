"""The demo for rankings: Plackett-Luce with ties, from scratch on generated rankings of four; needs no network.

    python -m rmjax.main --config=configs/bt_rankings_tiny.py --workdir=runs/rankings

Hardware: any CPU; here 2 cores.
Hours: below 0.05. Score on the validation data, in per cent:

                                                   pairs ranked apart    best reply of a ranking
                                                   (accuracy)            (top1_accuracy)
    before training (2 seeds)                      48 and 51             36 and 41
    after (2 seeds; a test asks for 90 and 87)     94.4 and 94.4         93.6 and 94.3
    best reachable (2 rankings of 20 are random)   94.7                  94.1
    the longer reply                               50.7                  39.7
    the first reply (as any other place)           51.5                  40.7

A reply ranks higher the more of the three words of the user turn it has (rmjax/data/synthetic/rankings.py), so prompt
and response are both needed: length alone, or a bag of words, predicts nothing. A quarter of the pairs are ties, and
one ranking in five is partial.
"""

from ml_collections import ConfigDict

from rmjax.config import demo


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    config = demo()
    config.duration = "3 epochs"

    config.data.train = "synthetic://rankings?n=4000&seed=0"
    config.data.validation = "synthetic://rankings?n=400&seed=1"

    config.objective.rankings = "plackett_luce"
    config.objective.ties = "efron"

    config.plan.groups_per_step = 32

    config.model.scratch.rope_theta = 1_000.0
    return config

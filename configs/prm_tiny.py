"""The demo of process rewards: each step of a chain is right or wrong, from scratch on generated chains; no network.

    python -m rmjax.main --config=configs/prm_tiny.py --workdir=runs/prm_tiny

Hardware: any CPU; here 2 cores.
Hours: about 0.01. Score (validation): 98.3 % of the steps and 96.7 % of the first errors at the best checkpoint, 98.2
and 96.3 % at the end (one seed, 2026-11-29). The first are the best reachable: the rest is planted noise. The majority
("right"; "no error") has 66 % and 47 %, the length 66 %, a linear model of all words no more, and a chain without its
prompt about 81 % of the steps.

A step is right if it has one of the two things that the prompt names, and no step before it is wrong
(`rmjax/data/synthetic/steps.py`), so prompt, step and earlier steps are all needed.
"""

from ml_collections import ConfigDict

from rmjax.config import demo


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    config = demo("prm")
    config.duration = "3 epochs"

    config.data.train = "synthetic://steps?n=6000&seed=0"
    config.data.validation = "synthetic://steps?n=600&seed=1"
    return config

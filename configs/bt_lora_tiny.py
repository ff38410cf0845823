"""The demo of adapters: a model that has learnt one rule learns another one, with a seventh as many parameters.

    python -m rmjax.main --config=configs/bt_lora_tiny.py --workdir=runs/lora_tiny

Hardware: any CPU; here 2 cores.
Hours: 0.06 (223 seconds from start to report beside other work on 2 cores of an AMD EPYC, 2026-11-30).
Score: pairs ranked apart on the validation data, in per cent (seed 0, 2026-11-30):

    the base, which has learnt the demo's pairs          74.6
    with adapters of rank 8 (19,520 numbers trained)     94.0
    the head alone (64 numbers trained, as long)         80.8
    all parameters, from scratch (bt_rankings_tiny.py)   94.4
    best reachable                                       94.7

The base is `bt_tiny.py`'s run (`config.start`): the better reply has the word that the prompt names. By the new rule
that reply is better which has more of three words (`rmjax/data/synthetic/rankings.py`). The base's own kernels stay as
they are.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of bt_rankings_tiny.py with what differs; takes no argument."""
    load = lambda name: runpy.run_path(str(Path(__file__).with_name(name)))["get_config"](arg)
    config = load("bt_rankings_tiny.py")
    config.start = load("bt_tiny.py")
    config.model.scratch, config.model.tokenizer = ConfigDict(), ""
    config.lora.rank = 8
    return config

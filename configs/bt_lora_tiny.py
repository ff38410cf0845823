"""The demo of adapters: a model that has learnt one rule learns another with a sixth of its parameters.

python -m rmjax.main --config=configs/bt_lora_tiny.py --workdir=runs/lora_tiny
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    load = lambda name: runpy.run_path(str(Path(__file__).with_name(name)))["get_config"](arg)
    config = load("bt_rankings_tiny.py")
    config.start = load("bt_tiny.py")
    config.model.scratch, config.model.tokenizer = ConfigDict(), ""
    config.lora.rank = 8
    return config

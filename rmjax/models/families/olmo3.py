"""OLMo 3: OLMo 2 with a window in three of four layers, and a stretched context in the others alone."""

from typing import Any

from rmjax.models.families import olmo2
from rmjax.models.families.base import Family, HfConfig, every, ropes_by_type, windows_of

DEFAULTS = {**olmo2.DEFAULTS, "sliding_window": 4096, "rope_theta": 500_000.0}


def _features(config: HfConfig) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    windows = windows_of(config.get("layer_types") or every(4, layers), layers, config["sliding_window"])
    ropes = ropes_by_type(config, windows, theta=5e5, local_theta=config["rope_theta"])
    return {**olmo2.features(config), "windows": windows, "ropes": ropes}


OLMO3 = Family("olmo3", "Olmo3", DEFAULTS, _features, olmo2.TABLE, olmo2.owns, ropes_by_type=True)

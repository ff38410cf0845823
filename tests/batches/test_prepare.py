"""What a run refuses of its data before a model is made."""

import numpy as np
import pytest

from rmjax import config as config_lib
from rmjax.batches import prepare


def test_a_run_refuses_names_before_anything_is_read():
    config = config_lib.defaults()
    config.data.train, config.data.columns = "synthetic://pairs", "prompt"
    with pytest.raises(ValueError, match=r"config\.data\.columns='prompt' does not say"):
        prepare.check_sources(config)


class Margins:
    def __init__(self, *margins):
        self.margins = np.array(margins, np.float32)


@pytest.mark.parametrize("key", ["margin_scale", "scaled"])
def test_a_loss_of_margins_needs_margins(key):
    config = config_lib.defaults()
    prepare.refuse_without_margin(config, Margins(0, 0))
    config.objective[key] = type(config.objective[key])(1)
    prepare.refuse_without_margin(config, Margins(0, 2))
    with pytest.raises(ValueError, match=f"config.objective.{key}=.*: no training group has a margin"):
        prepare.refuse_without_margin(config, Margins(0, 0))

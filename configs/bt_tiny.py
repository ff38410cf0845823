"""The demo: Bradley-Terry from scratch on generated pairs; needs no network and no download.

    python -m rmjax.main --config=configs/bt_tiny.py --workdir=runs/tiny

Hardware: 2 CPU cores. Hours: 0.01 (36 seconds measured on a 2-core AMD EPYC, 2026-11-21). Score: validation accuracy of
49 % before and 99 % after; two other seeds end above 85 % in a test.

The preferred response contains the word that the last user turn names (`rmjax/data/synthetic.py`), so prompt and
response are both needed: length alone, or a bag of words, predicts nothing.
"""

from ml_collections import ConfigDict

from rmjax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    config = defaults()
    config.duration = "3 epochs"

    config.model.tokenizer = "synthetic"
    config.model.scratch = ConfigDict(
        {
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,  # a model this narrow hardly moves from Qwen's 0.02
        }
    )
    config.model.remat = "none"

    config.data.train = "synthetic://pairs?n=6000&seed=0"
    config.data.validation = "synthetic://pairs?n=600&seed=1"

    config.plan.row_tokens = 512
    config.plan.groups_per_step = 64

    config.optim.learning_rate = 3e-3
    config.optim.warmup = "5%"
    config.optim.weight_decay = 0.01
    return config

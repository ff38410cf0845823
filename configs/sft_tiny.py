"""The demo of a judge that writes: a language model from scratch on generated data; needs no network and no download.

    python -m rmjax.main --config=configs/sft_tiny.py --workdir=runs/sft_tiny

Hardware: any CPU; here 2 cores, 679 steps of 62 conversations.
Score: verdict accuracy on the 600 validation rows of 2 % before and 95.0 % after (one seed, 2026-11-29). Best
reachable: 95 %, since one rating in twenty is wrong. Baselines: always the same rating 50 %; length alone has an AUC of
0.49.

The judge is shown a prompt and a reply and writes `<score>5</score>` or `<score>1</score>`: whether the reply has the
word that the prompt names (`rmjax/data/synthetic/ratings.py`), so that prompt and reply are both needed. A verdict is
right where each of its tokens is the likeliest one.
"""

from ml_collections import ConfigDict

from rmjax.config import demo

# The packaged question is long for a tokenizer that knows few words.
TEMPLATE = "{{ prompt }}\n{{ response }}"


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    config = demo("sft")
    config.duration = "7 epochs"

    config.data.train = "synthetic://ratings?n=6000&seed=0"
    config.data.validation = "synthetic://ratings?n=600&seed=1"

    config.objective.target = "score"
    config.objective.template = TEMPLATE

    config.optim.learning_rate = 3e-3

    config.checkpoint.metric, config.checkpoint.mode = "validation/verdict_accuracy", "max"
    return config

"""The demo of reinforcement: a judge that is half trained learns from the worth of its own verdicts.

    python -m rmjax.main --config=configs/grpo_tiny.py --workdir=runs/grpo_tiny

Hardware: any CPU; here 2 cores.
Hours: 0.04 (130 seconds from start to report on 2 cores of an AMD EPYC, 178 seconds of CPU, 2026-11-30).
Score: the share of sampled verdicts that are right, of ratings 1 and 5 of 600 validation rows with 4 verdicts of each,
before and after (2026-11-30):

    seed (--config.seed and --config.start.seed)      0         1         2
    the run that comes first                       73.6 %    76.5 %    84.2 %
    after 80 steps                                 94.5 %    93.9 %    94.6 %

Best reachable: 95 %, since one rating in twenty is wrong. Baselines: always the same rating 50 %; imitation of the
same rows that goes on instead 95.0 % of the likeliest verdicts, after 146 steps of 62 rows.

The rule: a reply about one of four topics is good, whatever the prompt asks (`rmjax/data/synthetic/ratings.py`). The
run begins with an imitation (`config.start`) that stops as soon as 80 % of the likeliest verdicts are right. Then 8
answers to each of 32 questions a step are drawn, and the right ones rewarded. The judge writes nothing before its
verdict here, so imitation is the better way; the demo shows that reinforcement finds the rule too, from rewards alone.
"""

from ml_collections import ConfigDict

from rmjax.config import demo

TEMPLATE = "{{ prompt }}\n{{ response }}"


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; takes no argument."""
    del arg
    start = demo("sft")
    start.duration = "6 epochs"
    start.data.train = "synthetic://favourites?n=6000&seed=0"
    start.data.validation = "synthetic://favourites?n=300&seed=2"
    start.objective.target = "score"
    start.objective.template = TEMPLATE
    start.optim.learning_rate = 3e-3
    start.eval.every = "10 steps"
    start.eval.train_groups = 0
    start.checkpoint.metric, start.checkpoint.mode = "validation/verdict_accuracy", "max"
    start.checkpoint.goal = 0.8

    config = demo("grpo")
    config.start = start
    config.duration = "80 steps"
    config.data.train = "synthetic://favourites?n=6000&seed=0"
    config.data.validation = "synthetic://favourites?n=600&seed=1"
    config.objective.target = "score"
    config.objective.template = TEMPLATE
    config.objective.reward = "exact"
    config.plan.micro_rows = 4
    config.rollout.prompts_per_step = 32
    config.rollout.samples = 8
    config.rollout.max_tokens = 16
    config.optim.learning_rate = 1e-3
    config.optim.warmup = "10 steps"
    config.optim.schedule = "constant"
    config.log.every = "10 steps"
    config.eval.every = "25%"
    config.eval.samples = 4
    config.eval.train_groups = 128
    return config

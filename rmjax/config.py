"""Every config key with its default, in one place; a file in `configs/` calls `defaults()` and states what differs.

Durations are text: "300 steps", "2 epochs", "5000 groups" or "10%" of the run (`steps_of`).
"""

import importlib.util
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from rmjax.suggestions import did_you_mean, install

# docs/config.md shows what stands between the two marks.
# --8<-- [start:keys]
# The keys of `config.objective` with their defaults; what they mean and may be is in each objective's docstring.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "bradley_terry": {
        "rankings": "pairs",  # of more than two responses: every labelled pair, or as one by "plackett_luce"
        "ties": "skip",  # pairs judged equal: skip, half a win each way, rao_kupper, davidson, or efron (of rankings)
        "label_smoothing": 0.0,  # probability that a label is wrong
        "margin_scale": 0.0,  # margins in the data, times this, are asked of the reward difference; 0 is off
        "scaled": False,  # the loss of a pair times its margin, if that is known
        "focal": 0.0,  # gamma: pairs already told apart count less; 2 as published, 0 is off
        "center": 0.0,  # weight of the squared sum of both rewards, which keeps their mean near 0
        "barrier": 0.0,  # weight, per response, of what keeps rewards within -5 and 5; 0.02 as published
        "length_balance": 0.0,  # 1 weights pairs so that lengths tell nothing; 0 is off
        "length_expert": (),  # what lengths tell by themselves, (log-odds, tokens); () is fitted to the training data
    },
    "pairwise": {
        "classes": 3,  # 3 (A, B, tie) or 2 (A, B)
        "template": "",  # Jinja2 file that states the judging question; "" is the packaged one
        "ties": "skip",  # with 2 classes, pairs judged equal: "skip" (counted), or train as "half" a verdict each way
        "strength": "none",  # of a preference: "none", "weight" of the pair, or log-odds of a "soft" label
        "strength_scale": 1.0,  # strengths in the data are multiplied by it
        "label_smoothing": 0.0,  # share of each label that is spread over all classes
    },
    "pointwise": {
        "attributes": ("score",),  # names of the scores in the data
        "scales": (0.0, 4.0),  # lowest and highest score, or such a pair for each attribute
        "loss": "mse",  # mse, huber, ordinal, categorical or hl_gauss
        "delta": 0.5,  # of huber: larger errors count linearly; 1 is half the scale
        "bins": 0,  # levels of ordinal, categorical and hl_gauss; 0 is one for each whole number of the scale
        "sigma": 0.75,  # of hl_gauss: standard deviation of a label, in widths of a bin
        "weights": (),  # of the attributes in the reward; () is their mean
    },
    "prm": {},
    "sft": {
        "turns": "all",  # learn "all" assistant turns, or the "last"
        "target": "messages",  # conversations as they are, or judges' of their "score" or "pair" verdicts
        "template": "",  # of a judge: Jinja2 file that states the question; "" is the packaged one
        "attributes": (),  # of "score": names of what is rated; () is all that a record has
        "scale": (1.0, 5.0),  # of "score": lowest and highest rating
        "ties": True,  # of "pair": whether a verdict may be "tie"; if not, ties are skipped (counted)
        "both_orders": False,  # of "pair": show each pair in both orders, not in one
    },
    "grpo": {
        "target": "pair",  # what is judged: "pair" or "score"
        "template": "",  # Jinja2 file that states the judging question; "" and "reasons" are packaged
        "attributes": (),  # of "score": name of what is rated; () is the only score that a record has
        "scale": (1.0, 5.0),  # of "score": lowest and highest rating
        "ties": True,  # of "pair": whether a verdict may be "tie"; if not, ties are skipped (counted)
        "both_orders": True,  # of "pair": both orders are one group of samples, else one is drawn by a hash
        # better, consistent (both orders right), exact, closeness, linear, decay, or one of your own
        # (rmjax/judging/rewards.py), which may read further columns of its row; "" is better of pairs, closeness of
        # scores
        "reward": "",
        "unreadable": 0.0,  # reward of an answer without a verdict
        "baseline": "others",  # the mean reward of the "others", or of the whole "group", itself included
        "per": "sample",  # the loss is divided by the number of samples, or of tokens ("token")
        "clip": (0.2, 0.28),  # how far a probability may fall and rise, as shares of it, before it pulls no more
        "kl": 0.0,  # weight of the divergence from the model that the run starts from
        "updates": 1,  # optimizer steps on the samples of a step
    },
}
SINKS = {  # what config.log.to may name, and the package of each (rmjax/train/sinks)
    "tensorboard": "tensorboardX",
    **{name: name for name in ("wandb", "swanlab", "mlflow", "trackio")},
}
METRICS = {  # what checkpoints are judged by, and which way
    "bradley_terry": ("validation/accuracy", "max"),
    "pairwise": ("validation/accuracy_averaged", "max"),
    "sft": ("validation/loss", "min"),
    "pointwise": ("validation/mse", "min"),
    "prm": ("validation/first_error_accuracy", "max"),
    "grpo": ("validation/accuracy", "max"),
}


def defaults(objective: str = "bradley_terry") -> ConfigDict:
    """Returns the locked config of a run of this objective; unknown keys are errors from here on.

    Raises:
        ValueError: an unknown objective.
    """
    if objective not in OBJECTIVES:
        hint = did_you_mean(objective, OBJECTIVES)
        raise ValueError(f"there is no objective {objective!r}, only {', '.join(OBJECTIVES)}{hint}")
    config = ConfigDict()
    config.seed = 0
    config.duration = "1 epoch"  # of training
    # A NaN or infinity in loss or gradients: "stop" the run, "skip" the step, or "rollback": go back to the newest
    # checkpoint and leave out the rows from there to the step.
    config.on_nonfinite = "stop"
    config.hooks = ""  # "module:function" that is told what happens (rmjax/train/hooks.py); several with commas
    config.on_hook_error = "warn"  # an error in a hook: "warn" logs it, "stop" ends the run
    config.debug = False  # layers unrolled and nothing compiled, so that print and breakpoints work
    # The config of a run that is made first, in WORKDIR/start; its export is then what model.init_from names.
    config.start = ConfigDict()

    config.model = model = ConfigDict()
    model.init_from = ""  # Hugging Face directory or hub id; "" trains from scratch, see `scratch`
    model.base = ""  # of an init_from that is a PEFT adapter: directory or hub id of its base; "" is what it names
    model.scratch = ConfigDict()  # for init_from="": values of a Hugging Face config.json, with `model_type`
    model.tokenizer = ""  # directory or hub id; "" is init_from; "synthetic" makes the demo's own
    # Score heads on the one model, of `bradley_terry`: each learns from its own resample of the groups, the reward is
    # their mean, and their spread is given beside it.
    model.heads = 1
    model.param_dtype = "float32"  # float32, or bfloat16 (rounded stochastically); the score head is float32 always
    model.compute_dtype = "auto"  # float32, bfloat16, or auto: float32 on CPUs and bfloat16 elsewhere
    # What the backward pass recomputes: "none" (all is saved), "full", names to save ("q,k,v,attention,mid,gate,up"),
    # or "auto": as little as fits the devices, by the compiler's account (rmjax/hardware/memory.py).
    model.remat = "auto"
    model.attention = "auto"  # its form: gpu, tpu (Pallas kernels), xla (any device), or auto: the device's own

    # Adapters of low rank beside a frozen base (LoRA): they, the score head and what an objective itself learns are all
    # that is trained, and that a checkpoint holds. Without a rank every parameter is trained.
    config.lora = lora = ConfigDict()
    lora.rank = placeholder(int)  # of each adapter, 8 to 64
    lora.alpha = placeholder(float)  # adapters are scaled by alpha / rank; without one it is twice the rank
    lora.root_scale = False  # scaled by alpha / sqrt(rank) instead (rsLoRA), for large ranks
    lora.targets = (r"decoder/.*/kernel",)  # regexes over parameter paths: the kernels that get an adapter
    # How the frozen kernels are kept: float32, bfloat16, int8 or nf4 (4.5 bits a number), or auto: in the compute
    # dtype, to which they are cast anyway.
    lora.base = "auto"

    config.data = data = ConfigDict()
    data.train = ""  # files, globs, hf://datasets/OWNER/NAME/..., separated by commas
    data.validation = ""  # the same; "" splits `validation_fraction` off the training data, by prompt
    data.validation_fraction = 0.05
    data.weights = ""  # how often an epoch shows the groups of a source: "helpsteer=2,hh-rlhf=0.25"; 1 for the others
    data.filter = ""  # of training and validation: "length < 2000 and source != 'x' and agreement > 0.6"
    data.sample = ""  # of training, by prompt: "1000" or "10%" of each source, or "hh-rlhf=1000,helpsteer=10%"
    data.augment = ""  # of training: "all_pairs" of rankings, "swap" (a copy with the responses reversed), or both
    data.format = "auto"  # a name from the table in docs/data.md, or detected from the columns
    # What columns are, for any format: "prompt=trajectory,system=system_prompt"; "ignore=notes" leaves one out.
    data.columns = ""
    data.template_kwargs = "{}"  # JSON, for the chat template: '{"enable_thinking": false}'
    data.max_length = 0  # tokens of one conversation; 0 is plan.row_tokens
    data.over_long = "drop"  # conversations over max_length: drop, truncate_prompt or truncate_response
    data.on_bad_row = "skip"  # rows that cannot be used: error, skip (counted), or keep where that is possible
    data.max_bad_fraction = 0.05  # more unusable rows than this stop the run
    data.workers = -1  # processes that tokenize; -1 is one per core, 0 is none but the main one
    data.cache_dir = ""  # "" is $XDG_CACHE_HOME/rmjax or ~/.cache/rmjax

    config.plan = plan = ConfigDict()
    plan.row_tokens = 4096  # length of a row; a group's tree must fit in one
    plan.rows_per_step = 0  # rows of one optimizer step, over all devices; 0 derives them from groups_per_step
    plan.groups_per_step = 64  # mean groups of a step when rows_per_step is 0
    plan.window = 2048  # groups packed together; larger is fuller, smaller is more random
    plan.micro_rows = 0  # rows per device in one micro-batch; 0 is 8,192 to 16,384 tokens, or less where memory ends

    config.objective = ConfigDict({"name": objective, **OBJECTIVES[objective]})

    # Bytes on the devices per parameter, as parameter + first moment + second moment; the gradient adds 4, or 2 where
    # parameters are bfloat16 and a step is one micro-batch:
    #   adamw     4+4+4; 4+2+4 with mu_dtype bfloat16; 2+2+2 with all three bfloat16; 4 or 2 with state_on host
    #   adafactor 4+0+0 or 2+0+0; means over rows and columns instead of moments, some 0.003 bytes
    #   muon      4+4+0 or 2+2+0 for the kernels of the layers, as adamw for the rest
    config.optim = optim = ConfigDict()
    optim.name = "adamw"  # adamw, adafactor or muon; one learning rate and weight decay serve all three alike
    optim.learning_rate = placeholder(float)  # the peak; without one 1e-5, or 1e-4 of adapters (config.lora)
    optim.schedule = "cosine"  # cosine, linear, constant or wsd (warm-up, stable, decay)
    optim.warmup = "3%"
    optim.decay = "20%"  # the last part of a wsd schedule
    optim.b1 = 0.9  # of adamw, as are b2 and eps
    optim.b2 = 0.95
    optim.eps = 1e-8
    optim.mu_dtype = "float32"  # of the first moment, or of muon's momentum
    optim.nu_dtype = "float32"  # of the second moment; bfloat16 is rounded stochastically
    optim.state_on = "device"  # or "host": moments go to the devices and back in every step, the last resort
    optim.clip_norm = 1.0  # of the global gradient; 0 is off
    optim.weight_decay = 0.0
    # Ordered (regex over the parameter path, value); the first match wins and an uncovered name is an error.
    optim.decays = ((r".*/(kernel|embedding)", True), (r".*", False))
    optim.freezes = NOTHING_FROZEN  # has no gradient, no moments and, where it is read from init_from, no checkpoint
    optim.lr_factors = ((r".*", 1.0),)

    if objective == "grpo":
        config.optim.warmup = "10 steps"  # Adam's first steps are as large as any, whatever the gradient's noise
        config.rollout = rollout = ConfigDict()
        rollout.prompts_per_step = 64  # questions of a step
        rollout.samples = 8  # answers to a question that are drawn (to each order of a pair)
        rollout.max_tokens = 1024  # of an answer
        rollout.prompts_at_once = 0  # prompts that are answered at a time; 0 is as many as fit
        rollout.truncated = "wrong"  # an answer that is cut off counts as an unreadable one, or is left out: "drop"
        # Questions whose answers all earn the same teach nothing: "skip" them (counted), or "resample" their answers,
        # up to three times in all.
        rollout.dead = "skip"
        rollout.source = ""  # file or directory of answers that were drawn elsewhere; "" draws them here
        rollout.most_mismatch = 0.5  # nats a token between sampler and training, from which on the run stops

    config.mesh = mesh = ConfigDict()
    mesh.data = 1  # replicas
    mesh.fsdp = -1  # rows and parameters split; -1 is what is left
    mesh.tensor = 1  # heads and mlp columns split

    config.eval = evaluation = ConfigDict()
    evaluation.every = "10%"
    evaluation.train_groups = 256  # of the training set, fixed, evaluated too: the gap is a metric; 0 is none
    # Benchmarks that are run with each evaluation, as "reward_bench,rm_bench=FILE": names, or NAME=SOURCE for data that
    # is not at its usual place. Their metrics, "reward_bench/overall", may be checkpoint.metric.
    evaluation.benchmarks = ""
    # Judgements that a judge that writes (`grpo`, `sft` with a target) draws of each question of the validation set.
    evaluation.samples = 8 if objective == "grpo" else 0
    evaluation.max_tokens = 0  # of a judgement; 0 is rollout.max_tokens, or 1,024 without that

    # What a run must reach for its model to be used (rmjax/evaluate/gate.py); 0, or False, asks nothing.
    config.gate = gate = ConfigDict()
    gate.accuracy = 0.70  # least validation accuracy
    gate.gap = 0.10  # accuracy in training is less than this above that in validation
    gate.convergence = 0.05  # of all that the training loss fell, the last tenth of the steps brought less than this
    gate.beats_length = True  # accuracy is above that of "the longer response is better"
    gate.ece = 0.10  # most expected calibration error
    gate.unreadable = 0.02  # of a judge that is asked by sampling: most answers without a verdict
    gate.cut_off = 0.05  # and most that are cut off
    gate.consistency = True  # and both orders of a pair agree as often as before training
    gate.exit_code = False  # a run that fails ends with exit code 3, not 0

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.dir = ""  # "" is WORKDIR/checkpoints; may be gs://BUCKET/... or s3://..., which needs gcsfs or s3fs
    checkpoint.every = ""  # more checkpoints, between those of the evaluations
    checkpoint.keep_latest = 2
    checkpoint.keep_best = 1
    checkpoint.metric, checkpoint.mode = METRICS[objective]
    checkpoint.patience = 0  # evaluations without a better metric before the run stops early; 0 is never
    checkpoint.goal = 0.0  # a value of the metric with which the run stops early; 0 is none

    config.log = log = ConfigDict()
    log.every = "10 steps"
    log.to = "tensorboard"  # beside the run's own files, with commas: tensorboard, wandb, swanlab, mlflow, trackio
    log.project = "rmjax"  # name of the project in those services
    log.report = True  # report.html and its plots, when the run ends

    config.profile = profile = ConfigDict()
    profile.steps = ""  # "10,15" traces steps 10 to 15, a few at most, into WORKDIR/profile

    config.export = export = ConfigDict()
    export.step = "best"  # "best" by checkpoint.metric, or "last"
    export.adapter = False  # a PEFT adapter of the base (config.lora) in place of a whole model
    export.dtype = "auto"  # float32, bfloat16, float16, or auto: that of init_from, else of the parameters
    config.lock()
    return config


# --8<-- [end:keys]


def sinks(config: ConfigDict) -> list[str]:
    """What config.log.to names.

    Raises:
        ValueError: something else than SINKS, or one twice.
    """
    names = [name.strip() for name in config.log.to.split(",") if name.strip()]
    for name in names:
        if name not in SINKS or names.count(name) > 1:
            problem = "names it twice" if name in SINKS else f"has {name!r}{did_you_mean(name, SINKS)}"
            raise ValueError(f"config.log.to={config.log.to!r} {problem}; expected some of {', '.join(SINKS)}")
    return names


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a run's config.json with the keys of today, also of its `start`."""
    log = values.get("log")
    if isinstance(log, dict) and "tensorboard" in log:  # of a run that began before there was log.to
        kept = {key: value for key, value in log.items() if key not in ("tensorboard", "wandb")}
        named = ["tensorboard"] * bool(log["tensorboard"]) + ["wandb"] * bool(log.get("wandb"))
        values = values | {"log": kept | {"to": ",".join(named), "project": log.get("wandb") or "rmjax"}}
    if values.get("start"):
        values = values | {"start": renamed(values["start"])}
    return values


def demo(objective: str = "bradley_terry") -> ConfigDict:
    """The defaults with what all demos share: a model of 0.14 M parameters, made on the spot, on generated data."""
    config = defaults(objective)
    config.model.tokenizer = "synthetic"
    config.model.scratch = ConfigDict(
        {
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,  # 32 wide, the least that vLLM serves
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,  # a model this narrow hardly moves from Qwen's 0.02
        }
    )
    config.plan.row_tokens = 512
    config.plan.groups_per_step = 64
    config.optim.learning_rate = 2e-3
    config.optim.warmup = "5%"
    config.optim.weight_decay = 0.01
    return config


LEARNING_RATE, OF_ADAPTERS = 1e-5, 1e-4
TRAINED_BESIDE_A_BASE = r".*/lora_[ab]|(score|objective)/.*"


def filled(config: ConfigDict) -> ConfigDict:
    """The config with the values that stand for "by the others": the learning rate, and what adapters freeze."""
    config = config.copy_and_resolve_references()
    adapts = config.lora.rank is not None
    if config.optim.learning_rate is None:
        config.optim.learning_rate = OF_ADAPTERS if adapts else LEARNING_RATE
    if adapts and tuple(map(tuple, config.optim.freezes)) == NOTHING_FROZEN:
        config.optim.freezes = ((TRAINED_BESIDE_A_BASE, False), (r".*", True))
    return config


NOTHING_FROZEN = ((r".*", False),)
CHOICES = {
    "on_nonfinite": ("stop", "skip", "rollback"),
    "on_hook_error": ("warn", "stop"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "gpu", "tpu"),
    "model.compute_dtype": ("auto", "float32", "bfloat16"),
    "lora.base": ("auto", "float32", "bfloat16", "int8", "nf4"),
    "rollout.truncated": ("wrong", "drop"),
    "rollout.dead": ("skip", "resample"),
    "data.over_long": ("drop", "truncate_prompt", "truncate_response"),
    "data.on_bad_row": ("error", "skip", "keep"),
    "optim.name": ("adamw", "adafactor", "muon"),
    "optim.schedule": ("cosine", "linear", "constant", "wsd"),
    "optim.mu_dtype": ("float32", "bfloat16"),
    "optim.nu_dtype": ("float32", "bfloat16"),
    "optim.state_on": ("device", "host"),
    "checkpoint.mode": ("max", "min"),
    "export.step": ("best", "last"),
    "export.dtype": ("auto", "float32", "bfloat16", "float16"),
}


def check(config: ConfigDict) -> None:
    """Refuses values that no run can use, before anything is read.

    Raises:
        ValueError: every problem found, one per line.
    """
    problems = []
    flat = dict(flatten(config))
    objective = flat.get("objective.name", "bradley_terry")
    if objective not in OBJECTIVES:
        raise ValueError(f"config.objective.name={objective!r} is none of {', '.join(OBJECTIVES)}")
    if missing := [key for key, _ in flatten(defaults(objective)) if key not in flat]:
        raise ValueError(
            f"the config lacks {', '.join(missing)}; start from rmjax.config.defaults({objective!r}) in get_config"
        )
    for key, allowed in CHOICES.items():
        if key in flat and flat[key] not in allowed:
            hint = did_you_mean(str(flat[key]), allowed)
            problems.append(f"config.{key}={flat[key]!r} is none of {', '.join(allowed)}{hint}")
    if not config.data.train:
        problems.append("config.data.train is empty; give a file, a glob or hf://datasets/OWNER/NAME/...")
    if objective == "grpo":
        problems += _rollout_problems(config)
    elif config.eval.samples and flat.get("objective.target", "messages") not in ("pair", "score"):
        problems.append("config.eval.samples is for judges that write: `grpo`, or `sft` with config.objective.target")
    elif config.eval.max_tokens and not config.eval.samples:
        problems.append("config.eval.max_tokens does nothing without config.eval.samples")
    if config.start:
        problems += [f"config.start: {line.strip()}" for line in _problems_of(config.start)]
    elif not config.model.init_from and not config.model.scratch:
        problems.append("config.model.init_from is empty; give a Hugging Face directory or hub id")
    if not config.model.init_from and not config.model.tokenizer and not config.start:
        problems.append("config.model.tokenizer is empty and there is no init_from to take it from")
    if config.model.heads < 1:
        problems.append(f"config.model.heads={config.model.heads} must be at least 1")
    elif config.model.heads > 1 and objective != "bradley_terry":
        problems.append(
            f"config.model.heads={config.model.heads} is for `bradley_terry`, whose reward is then their mean; "
            f"`{objective}` has the outputs that it needs, so leave it out"
        )
    problems += _lora_problems(config)
    positive = ["plan.row_tokens", "plan.window", "optim.eps", "checkpoint.keep_latest"]
    positive += ["optim.learning_rate"] * (config.optim.learning_rate is not None)
    if objective == "grpo":
        positive += [f"rollout.{key}" for key in ("prompts_per_step", "max_tokens", "most_mismatch")]
    not_negative = (
        *("seed", "data.max_bad_fraction"),
        *(
            "plan.rows_per_step",
            "plan.groups_per_step",
            "plan.micro_rows",
            "optim.clip_norm",
            "optim.weight_decay",
        ),
        *("checkpoint.keep_best", "checkpoint.patience"),
        *("data.max_length", "eval.train_groups", "optim.b1", "optim.b2"),
        *("gate.accuracy", "gate.gap", "gate.convergence", "gate.ece", "gate.unreadable", "gate.cut_off"),
        *("eval.samples", "eval.max_tokens"),
    )
    problems += [f"config.{key}={flat[key]} must be above 0" for key in positive if not flat[key] > 0]
    problems += [f"config.{key}={flat[key]} must not be negative" for key in not_negative if flat[key] < 0]
    problems += [f"config.{key}={flat[key]} must be below 1" for key in ("optim.b1", "optim.b2") if not flat[key] < 1]
    if flat["data.max_bad_fraction"] > 1:
        problems.append(f"config.data.max_bad_fraction={flat['data.max_bad_fraction']} must be at most 1")
    if flat["gate.accuracy"] > 1:
        problems.append(f"config.gate.accuracy={flat['gate.accuracy']} must be at most 1; 0.7 is 70 %")
    if flat["data.workers"] < -1:
        problems.append(f"config.data.workers={flat['data.workers']} must be a number of processes, or -1")
    if not config.plan.rows_per_step and not config.plan.groups_per_step:
        problems.append("set config.plan.rows_per_step or config.plan.groups_per_step")
    try:
        template_kwargs(config)
    except ValueError as error:
        problems.append(str(error))
    try:
        profile_steps(config.profile.steps)
    except ValueError as error:
        problems.append(str(error))
    for key in ("duration", "eval.every", "checkpoint.every", "log.every", "optim.warmup", "optim.decay"):
        try:
            amount, unit = parse_duration(flat[key]) if flat[key] or key != "checkpoint.every" else (1.0, "")
            if not amount and not key.startswith("optim."):
                problems.append(f"config.{key}={flat[key]!r} must be above 0; for never, give more than the run has")
            if key == "duration" and unit == "%":
                problems.append(
                    f"config.duration={flat[key]!r} must be in steps, epochs or groups, not a share of itself"
                )
        except ValueError as error:
            problems.append(f"config.{key}: {error}")
    if config.export.step == "best" and not config.checkpoint.keep_best:
        problems.append(
            "config.export.step='best' needs config.checkpoint.keep_best of at least 1; or export the 'last'"
        )
    try:
        needed = [(name, SINKS[name]) for name in sinks(config)]
        missing = [name for name, package in needed if importlib.util.find_spec(package) is None]
        problems += [f"config.log.to has {name}, which needs a package: {install(name)}" for name in missing]
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("the config cannot be used:\n  " + "\n  ".join(problems))


def _lora_problems(config: ConfigDict) -> list[str]:
    lora, default = config.lora, defaults().lora
    if lora.rank is None:
        changed = [key for key in default if key != "rank" and _plain(lora[key]) != _plain(default[key])]
        problems = [f"config.lora.{key}={lora[key]!r} does nothing without config.lora.rank" for key in changed]
        return problems + ["config.export.adapter needs config.lora.rank"] * config.export.adapter
    problems = []
    if config.export.adapter and not config.model.init_from:
        problems.append(
            "config.export.adapter: an adapter needs a base that others can load; give config.model.init_from"
        )
    if lora.rank < 1:
        problems.append(
            f"config.lora.rank={lora.rank} must be at least 1; leave it out to train every parameter, or set "
            'config.optim.freezes=(("score/.*", False), (".*", True)) to train the head alone'
        )
    if lora.alpha is not None and not lora.alpha > 0:
        problems.append(f"config.lora.alpha={lora.alpha} must be above 0")
    if config.optim.name == "muon":
        problems.append("config.optim.name='muon' steps kernels, which config.lora freezes; take adamw or adafactor")
    if isinstance(lora.targets, str) or not lora.targets:
        problems.append(f"config.lora.targets={lora.targets!r} is no list of regexes; the default is every kernel")
        return problems
    for target in lora.targets:
        try:
            re.compile(target)
        except (TypeError, re.error) as error:
            problems.append(f"config.lora.targets: {target!r} is no regex: {error}")
    return problems


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _rollout_problems(config: ConfigDict) -> list[str]:
    rollout, problems = config.rollout, []
    if rollout.samples < 2:
        problems.append(f"config.rollout.samples={rollout.samples} must be at least 2: answers are compared")
    if rollout.prompts_at_once < 0:
        problems.append(f"config.rollout.prompts_at_once={rollout.prompts_at_once} must not be negative")
    if not config.eval.samples:
        problems.append("config.eval.samples=0: a judge is measured by what it writes; give at least 1")
    if rollout.max_tokens >= config.plan.row_tokens:
        problems.append(
            f"config.rollout.max_tokens={rollout.max_tokens} leaves no room for a question in a row of "
            f"config.plan.row_tokens={config.plan.row_tokens}"
        )
    return problems


def _problems_of(config: ConfigDict) -> list[str]:
    try:
        check(config)
    except ValueError as error:
        return str(error).splitlines()[1:] or [str(error)]
    return []


def answer_tokens(config: ConfigDict) -> int:
    """The most tokens of a judgement that is sampled to evaluate a run's model."""
    return config.eval.max_tokens or (config.rollout.max_tokens if "rollout" in config else 1024)


def template_kwargs(config: ConfigDict) -> dict[str, Any]:
    """The arguments of the chat template.

    Raises:
        ValueError: config.data.template_kwargs is not a JSON object.
    """
    try:
        values = json.loads(config.data.template_kwargs)
    except json.JSONDecodeError as error:
        values = error
    if not isinstance(values, dict):
        raise ValueError(f"config.data.template_kwargs={config.data.template_kwargs!r} is not a JSON object: {values}")
    return values


def profile_steps(text: str) -> tuple[int, int] | None:
    """The first and the last step of config.profile.steps, counted from 1 as on the progress line; None for "".

    Raises:
        ValueError: not two numbers in order.
    """
    if not text:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", str(text))
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"config.profile.steps={text!r} is no range of steps; write '10,15' for steps 10 to 15 (the first step is "
            "1), or '' for no profile"
        )
    return first, last


def parse_duration(text: str) -> tuple[float, str]:
    """Splits a duration into amount and unit: "1.5 epochs" is (1.5, "epoch"), "10%" is (10.0, "%").

    Raises:
        ValueError: not a number with one of the units steps, epochs, groups or %.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]{1,2})?)\s*(steps?|epochs?|groups?|%)\s*", str(text))
    try:
        return float(match[1]), match[2].rstrip("s")  # type: ignore[index]
    except (TypeError, ValueError):
        raise ValueError(f'{text!r} is no duration; write "300 steps", "2 epochs", "5000 groups" or "10%"') from None


def steps_of(text: str, *, steps_per_epoch: float, groups_per_step: float, total: int = 0) -> int:
    """Converts a duration to whole optimizer steps, rounded to the nearest.

    Args:
        text: the duration.
        steps_per_epoch: steps that show every group once.
        groups_per_step: mean groups of a step.
        total: steps of the run, what "%" is of; 0 when not yet known, then "%" is an error.

    Raises:
        ValueError: not a duration, or a percentage where the run's length itself is asked for.
    """
    amount, unit = parse_duration(text)
    if unit == "%" and not total:
        raise ValueError(f"config.duration={text!r} must be in steps, epochs or groups, not a share of itself")
    per_unit = {"step": 1.0, "epoch": steps_per_epoch, "group": 1 / groups_per_step, "%": total / 100}[unit]
    return math.floor(amount * per_unit + 0.5)


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("optim.learning_rate", 1e-5), ... for every leaf."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def to_json(config: ConfigDict) -> str:
    """The resolved config as it is saved in the workdir."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def differences(old: str, new: str) -> list[str]:
    """Lists the keys in which two saved configs differ, as "config.seed: 0 before, 1 now"."""
    before, now = (dict(flatten(ConfigDict(renamed(json.loads(text))))) for text in (old, new))
    keys = sorted(before.keys() | now.keys())
    # of a key that one of them did not have yet
    default = dict(flatten(ConfigDict(json.loads(to_json(defaults(now["objective.name"]))))))
    pairs = {key: [side.get(key, default.get(key, "absent")) for side in (before, now)] for key in keys}
    return [f"config.{key}: {old!r} before, {new!r} now" for key, (old, new) in pairs.items() if old != new]

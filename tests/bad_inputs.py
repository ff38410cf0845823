"""Broken inputs of every kind, for the public commands: arguments, config files and keys, data and rows.

Those that need a model are in bad_models.py. A case is a row: what is wrong, the command with its arguments, what
its error must say, and the files that it is given.
"""

import dataclasses
import gzip
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import format_rows
import pyarrow as pa
import pyarrow.parquet as pq


@dataclasses.dataclass(frozen=True)
class Case:
    """One broken input.

    Attributes:
        name: what is wrong.
        command: the module and its arguments; "{name}" is the path of an asset (see test_bad_input.py).
        says: what the error must contain, the culprit's name above all.
        files: of its directory, by name.
        make: makes more of them, from the directory and the assets.
    """

    name: str
    command: tuple[str, ...]
    says: str
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    make: Callable[[Path, Mapping[str, Path]], None] | None = None


def lines(*rows: Any) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(*rows: Any) -> bytes:
    """A Parquet file."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


PAIR = format_rows.ROWS["pair_text"]
PAIRS = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(3)]
SMALL = "pairs?n=200"
TINY = "--config={configs}/bt_tiny.py"


def flag(name: str, value: Any, says: str, config: str = "bt_tiny", *more: str) -> Case:
    """A key of the config with a value that no run can use."""
    given = f"--config.{name}={value}"
    data = {"bt_tiny": SMALL, "pointwise_tiny": "scores?n=300"}.get(config)
    few = [f"--config.data.train=synthetic://{data}", "--config.data.validation="] if data else []
    command = ("rmjax.main", f"--config={{configs}}/{config}.py", "--workdir=run", *few, given, *more)
    return Case(f"{config} {given} {' '.join(more)}".strip(), command, says)


def arguments(command: str, says: str, **files: bytes) -> Case:
    """A command line."""
    return Case(command, tuple(command.split(" ")), says, {name.replace("__", "."): x for name, x in files.items()})


ARGUMENTS = [
    arguments("rmjax.main", "--config=FILE.py and --workdir=DIRECTORY are required"),
    arguments(f"rmjax.main {TINY}", "--config=FILE.py and --workdir=DIRECTORY are required"),
    arguments("rmjax.main --workdir=run", "--config=FILE.py and --workdir=DIRECTORY are required"),
    arguments(f"rmjax.main {TINY} --workdir=run stray", "unexpected arguments ['stray']"),
    arguments(f"rmjax.main {TINY} --wrokdir=run", "wrokdir"),
    arguments(f"rmjax.main {TINY} --workdir=run --dry_run=perhaps", "dry_run"),
    arguments(f"rmjax.main {TINY} --workdir=run --dry_run --config.debug", "config.debug compiles nothing"),
    arguments("rmjax.main --config=gone.py --workdir=run", "there is no config file 'gone.py'"),
    arguments(f"rmjax.main {TINY} --workdir=file", "file is a file; give a directory", file=b"x"),
    arguments(f"rmjax.main {TINY} --workdir=file/below/it", "file is a file; give a directory", file=b"x"),
    arguments("rmjax.benchmark", "--config=FILE.py is required"),
    arguments(f"rmjax.benchmark {TINY} --steps=0", "steps"),
    arguments(f"rmjax.benchmark {TINY} --steps=many", "steps"),
    arguments(f"rmjax.benchmark {TINY} stray", "unexpected arguments ['stray']"),
    arguments(f"rmjax.benchmark {TINY} --lengths=gone", "--lengths=gone: there is no such file"),
    arguments(f"rmjax.benchmark {TINY} --lengths=a.json", "--lengths=a.json is not JSON", a__json=b"{"),
    arguments(f"rmjax.benchmark {TINY} --lengths=a.json", "--lengths=a.json: row 1 is", a__json=b"[[1,2,3],[1,0,3]]"),
    arguments(f"rmjax.benchmark {TINY} --lengths=b.json", "--lengths=b.json holds dict", b__json=b"{}"),
    arguments(f"rmjax.benchmark {TINY} --lengths=c.json", "--lengths=c.json is not JSON", c__json=b"\xff\xfe[]"),
    arguments(f"rmjax.benchmark {TINY} --json=.", "is a directory; name another"),
    arguments(f"rmjax.benchmark {TINY} --json=file/x.json", "--json=file/x.json", file=b"x"),
    arguments(f"rmjax.benchmark {TINY} --compare=plan.row_token=3", "there is no config key 'plan.row_token'"),
    arguments(f"rmjax.benchmark {TINY} --compare=gone.py", "there is no config file 'gone.py'"),
    arguments(f"rmjax.benchmark {TINY} --compare=a.py --compare=b.py", "a.py and b.py; two sides"),
    arguments("rmjax.benchmark --config={configs}/pointwise_tiny.py", "'pointwise': random pairs only"),
    arguments(f"rmjax.benchmark {TINY} --config.debug", "config.debug compiles nothing"),
    arguments(f"rmjax.benchmark {TINY} --config.plan.row_tokens=8", "(config.plan.row_tokens)"),
    arguments("rmjax.score", "--model is required"),
    arguments("rmjax.score --model=x", "--input is required"),
    arguments("rmjax.score --model=x --input=y", "--output is required"),
    arguments("rmjax.score --model=x --input=y --output=z.jsonl stray", "unexpected arguments ['stray']"),
    arguments("rmjax.score --model=x --input=y --output=z.jsonl --dtype=float8", "dtype"),
    arguments(
        "rmjax.score --model=x --input=y --output=z.jsonl --template_kwargs={", "--template_kwargs={ is not JSON"
    ),
    arguments("rmjax.score --model=x --input=y --output=z.jsonl --template_kwargs=1", "--template_kwargs=1 is not a"),
    arguments("rmjax.score --model=x --input=y --output=z.jsonl --inptu=a", "inptu"),
    arguments("rmjax.score --model=a,b --input=y --output=z.jsonl --combine=meen", "did you mean 'mean'?"),
    arguments("rmjax.score --model=a --input=y --output=z.jsonl --combine=min", "--combine=min is for several models"),
    arguments("rmjax.score --model=a,b,a --input=y --output=z.jsonl", "--model names a twice"),
    arguments("rmjax.score --model=a,b --input=y --output=z.jsonl", "a: no such directory"),
    arguments("rmjax.data", "COMMAND"),
    arguments("rmjax.data inspct a.jsonl", "did you mean 'inspect'?"),
    arguments("rmjax.data inspect", "SOURCE"),
    arguments("rmjax.data inspect a.jsonl --shw=3", "did you mean --show?"),
    arguments("rmjax.data inspect a.jsonl --show=some", "--show"),
    arguments("rmjax.data inspect a.jsonl --format=pairs", "--format"),
    arguments("rmjax.data convert a.jsonl", "--output"),
    arguments("rmjax.data split a.jsonl --output=d", "--split"),
    arguments("rmjax.data split a.jsonl --output=d --split=half", "'half' is no split"),
    arguments("rmjax.data split a.jsonl --output=d --split=a=0.5,b=0.4", "add up to 0.9"),
    arguments("rmjax.data split a.jsonl --output=d --split=a=1.2.3,b=4", "is no split"),
    arguments("rmjax.data split a.jsonl --output=d --split=a=1 --seed=x", "--seed"),
    arguments("rmjax.data split a.jsonl --output=x.parquet --split=a=0.5,b=0.5", "--output=x.parquet is one file"),
    arguments("rmjax.data split a.jsonl --output=d --split=a=0.5,b=0.5", "leave nothing for b", a__jsonl=lines(PAIR)),
    arguments("rmjax.data convert a.jsonl --output=file", "--output=file is a file", file=b"x", a__jsonl=lines(PAIR)),
    arguments("rmjax.data convert a.jsonl --output=f/d", "--output=f/d", f=b"x", a__jsonl=lines(PAIR)),
    arguments(
        "rmjax.data convert a.jsonl --output=b.parquet",
        "b.parquet is there already and was not written by this",
        a__jsonl=lines(PAIR),
        b__parquet=parquet(PAIR),
    ),
    arguments("rmjax.data convert a.jsonl --output=.", "holds a.jsonl", a__jsonl=lines(PAIR)),
    arguments("rmjax.data convert a.jsonl --output=d --on_bad_row=ignore", "--on_bad_row"),
    arguments(
        "rmjax.data convert a.jsonl --output=d --to=label_studio --scale=low",
        "--scale=low is not two",
        a__jsonl=lines(PAIR),
    ),
    arguments(
        "rmjax.data convert a.jsonl --output=d --to=label_studio --split=a=1", "split first", a__jsonl=lines(PAIR)
    ),
    arguments(
        "rmjax.data convert a.jsonl --output=d --to=label_studio --ask=rating --scale=1,50",
        "a scale of 2 to 10",
        a__jsonl=lines(PAIR),
    ),
    arguments(
        "rmjax.data convert a.jsonl --output=d --to=label_studio",
        "a preference is between 2 responses",
        a__jsonl=lines(format_rows.ROWS["ranked"]),
    ),
    arguments("rmjax.data audit", "audit needs a SOURCE"),
    arguments("rmjax.data audit a.jsonl --config.seed=x", "seed", a__jsonl=lines(PAIR)),
    arguments("rmjax.data audit a.jsonl --config.data.fromat=x", "'data.fromat'", a__jsonl=lines(PAIR)),
    arguments("rmjax.data audit a.jsonl --objective=bt", "there is no objective 'bt'", a__jsonl=lines(PAIR)),
    arguments("rmjax.data audit a.jsonl --config=gone.py", "there is no config file 'gone.py'", a__jsonl=lines(PAIR)),
    arguments(f"rmjax.data audit a.jsonl {TINY} --objective=sft", "--objective is a part of --config"),
    arguments("rmjax.data audit a.jsonl --benchmark=b.jsonl", "b.jsonl: no such file", a__jsonl=lines(*PAIRS)),
    arguments("rmjax.data audit a.jsonl --validation=b.jsonl", "b.jsonl: no such file", a__jsonl=lines(*PAIRS)),
    arguments("rmjax.data audit a.jsonl --html=f/x.html", "--html=f/x.html", f=b"x", a__jsonl=lines(*PAIRS)),
]

KEYS = [
    flag("on_nonfinite", "ignore", "config.on_nonfinite='ignore' is none of"),
    flag("model.param_dtype", "float64", "config.model.param_dtype='float64' is none of"),
    flag("model.compute_dtype", "fp8", "config.model.compute_dtype='fp8' is none of"),
    flag("model.attention", "flash", "config.model.attention='flash' is none of"),
    flag("data.over_long", "cut", "config.data.over_long='cut' is none of"),
    flag("data.on_bad_row", "skp", "did you mean 'skip'?"),
    flag("optim.name", "sgd", "config.optim.name='sgd' is none of"),
    flag("optim.schedule", "cosin", "did you mean 'cosine'?"),
    flag("optim.mu_dtype", "int8", "config.optim.mu_dtype='int8' is none of"),
    flag("optim.nu_dtype", "int8", "config.optim.nu_dtype='int8' is none of"),
    flag("optim.state_on", "disk", "config.optim.state_on='disk' is none of"),
    flag("checkpoint.mode", "most", "config.checkpoint.mode='most' is none of"),
    flag("export.step", "first", "config.export.step='first' is none of"),
    flag("export.dtype", "int4", "config.export.dtype='int4' is none of"),
    flag("seed", "abc", "seed"),
    flag("seed", "-1", "config.seed=-1"),
    flag("optim.learning_rate", "fast", "optim.learning_rate"),
    flag("optim.learning_rate", "0", "config.optim.learning_rate=0.0 must be above 0"),
    flag("optim.learning_rate", "nan", "config.optim.learning_rate=nan must be above 0"),
    flag("optim.b1", "1.5", "config.optim.b1=1.5"),
    flag("optim.b2", "-1", "config.optim.b2=-1"),
    flag("optim.eps", "-1", "config.optim.eps=-1"),
    flag("optim.clip_norm", "-1", "config.optim.clip_norm=-1.0 must not be negative"),
    flag("optim.weight_decay", "-0.1", "config.optim.weight_decay=-0.1 must not be negative"),
    flag("optim.warmup", "soon", "config.optim.warmup: 'soon' is no duration"),
    flag("optim.warmup", "100%", "warm-up of", "bt_tiny", "--config.optim.schedule=wsd"),
    flag("optim.decay", "x%", "config.optim.decay: 'x%' is no duration"),
    flag("optim.decays", "1", "config.optim.decays"),
    flag("plan.row_tokens", "0", "config.plan.row_tokens=0 must be above 0"),
    flag("plan.row_tokens", "16", "data.max_length=87 takes all of them"),
    flag("plan.rows_per_step", "-4", "config.plan.rows_per_step=-4 must not be negative"),
    flag("plan.groups_per_step", "-1", "config.plan.groups_per_step=-1 must not be negative"),
    flag("plan.groups_per_step", "0", "set config.plan.rows_per_step or config.plan.groups_per_step"),
    flag("plan.window", "0", "config.plan.window=0 must be above 0"),
    flag("plan.micro_rows", "-1", "config.plan.micro_rows=-1 must not be negative"),
    flag("plan.rows", "1", "there is no config key 'plan.rows'"),
    flag("plan", "1", "config.plan is a group of keys"),
    flag("duration", "5", "config.duration: '5' is no duration"),
    flag("duration", "50%", "not a share of itself"),
    flag("duration", "0 steps", "config.duration='0 steps' must be above 0"),
    flag("duration", "1e999 epochs", "config.duration"),
    flag("eval.every", "often", "config.eval.every: 'often' is no duration"),
    flag("eval.train_groups", "-1", "config.eval.train_groups=-1 must not be negative"),
    flag("log.every", "1 hour", "config.log.every: '1 hour' is no duration"),
    flag("log.to", "wandb", "config.log.to has wandb, which needs a package: "),
    flag("log.to", "tensorbord", "config.log.to='tensorbord' has 'tensorbord'; did you mean 'tensorboard'?"),
    flag("log.to", "tensorboard,tensorboard", "names it twice"),
    flag("checkpoint.every", "0%", "config.checkpoint.every='0%' must be above 0"),
    flag("checkpoint.keep_latest", "0", "config.checkpoint.keep_latest=0 must be above 0"),
    flag("checkpoint.keep_best", "-1", "config.checkpoint.keep_best=-1 must not be negative"),
    flag("checkpoint.keep_best", "0", "config.export.step='best' needs config.checkpoint.keep_best"),
    flag("checkpoint.patience", "-1", "config.checkpoint.patience=-1 must not be negative"),
    flag("mesh.tensor", "3", "mesh "),
    flag("mesh.data", "0", "sizes must be positive"),
    flag("model.remat", "q,x", "remat 'q,x' names 'x'"),
    flag("model.tokenizer", "", "config.model.tokenizer is empty"),
    flag("model.tokenizer", "gone/dir/ectory", "gone/dir/ectory"),
    flag("data.train", "", "config.data.train is empty"),
    flag("data.train", ",", "no data was named"),
    flag("data.train", "gone.jsonl", "gone.jsonl: no such file"),
    flag("data.train", "no*.jsonl", "no*.jsonl: no such file"),
    flag("data.train", "ftp://host/a.jsonl", "unknown scheme ftp://"),
    flag("data.train", "python://mine", "python://mine: nothing has that name"),
    flag("data.train", "synthetic://pears", "unknown synthetic data 'pears'"),
    flag("data.train", "synthetic://pairs?m=3", "has no option 'm'"),
    flag("data.train", "synthetic://pairs?n=some", "n must be a whole number"),
    flag("data.validation", "gone.jsonl", "gone.jsonl: no such file"),
    flag("data.validation_fraction", "1.5", "validation_fraction=1.5", "bt_tiny", "--config.data.validation="),
    flag("data.format", "pair", "unknown data format 'pair'"),
    flag("data.filter", "length <", "is no expression"),
    flag("data.filter", "len < 3", "'len' is no field"),
    flag("data.filter", "__import__('os').system('true')", "config.data.filter"),
    flag("data.filter", "length < 0", "is true of none"),
    flag("data.filter", "length", "is not true or false"),
    flag("data.sample", "many", "config.data.sample='many'"),
    flag("data.sample", "120%", "config.data.sample='120%'"),
    flag("data.sample", "x=10", "there is no source 'x'"),
    flag("data.weights", "a", "config.data.weights='a'"),
    flag("data.weights", "x=2", "there is no source 'x'"),
    flag("data.weights", "pairs=1,pairs=2", "does not give each source once"),
    flag("data.augment", "mirror", "config.data.augment='mirror'"),
    flag("data.augment", "swap,swap", "names 'swap' twice"),
    flag("data.max_length", "-1", "config.data.max_length=-1 must not be negative"),
    flag("data.max_bad_fraction", "2", "config.data.max_bad_fraction=2"),
    flag("data.workers", "-2", "config.data.workers=-2"),
    flag("data.template_kwargs", "{", "config.data.template_kwargs='{' is not a JSON object"),
    flag("data.template_kwargs", "[1]", "config.data.template_kwargs='[1]' is not a JSON object"),
    flag("data.template_kwargs", '{"tokenize":true}', "'tokenize' is set by rmjax"),
    flag("objective.ties", "drop", "config.objective.ties='drop' is none of"),
    flag("objective.rankings", "best", "config.objective.rankings='best' is none of"),
    flag("objective.label_smoothing", "0.7", "config.objective.label_smoothing=0.7 must be in"),
    flag("objective.focal", "-1", "config.objective.focal=-1.0 must not be negative"),
    flag("objective.nmae", "x", "there is no config key 'objective.nmae'"),
    flag("objective.loss", "l1", "config.objective.loss='l1' is none of", "pointwise_tiny"),
    flag("objective.delta", "0", "config.objective.delta=0", "pointwise_tiny"),
    flag("objective.bins", "1", "config.objective.bins=1", "pointwise_tiny"),
    flag("objective.scales", "(4.0,0.0)", "config.objective.scales", "pointwise_tiny"),
    flag("objective.attributes", "()", "config.objective.attributes", "pointwise_tiny"),
    flag(
        "objective.attributes",
        "('style','wit')",
        "no training group has wit",
        "pointwise_tiny",
        "--config.data.max_bad_fraction=1",
    ),
    flag("objective.classes", "4", "config.objective.classes=4 is none of", "pairwise_tiny"),
    flag("objective.strength", "x", "config.objective.strength='x' is none of", "pairwise_tiny"),
    flag("objective.strength_scale", "0", "config.objective.strength_scale=0", "pairwise_tiny"),
    flag("objective.template", "gone.jinja", "no judging template gone.jinja", "pairwise_tiny"),
    flag("objective.turns", "some", "config.objective.turns", "sft_tiny"),
    flag("objective.target", "poem", "config.objective.target", "sft_tiny"),
    flag("data.train", "synthetic://scores?n=200", "no_label", "bt_tiny"),
]

SET = "from rmjax.config import defaults, demo\n\ndef get_config():\n    config = demo()\n    {}\n    return config\n"


def config_file(text: str, says: str, *more: str) -> Case:
    """A config file."""
    command = ("rmjax.main", "--config=my.py", "--workdir=run", *more)
    return Case(
        f"config file: {(text.strip() or 'empty').splitlines()[-1]} {says}", command, says, {"my.py": text.encode()}
    )


CONFIG_FILES = [
    config_file(SET.format("config.optim.learning_rte = 1"), "my.py, line 5: there is no key 'learning_rte'"),
    config_file(SET.format("config.seed = 1 / 0"), "my.py, line 5: ZeroDivisionError"),
    config_file(SET.format("config.seed = 'x'"), "my.py, line 5: TypeError"),
    config_file(SET.format("config = config.to_dict()"), "my.py: get_config() returned dict"),
    config_file(SET.format("config = (1"), "my.py: SyntaxError"),
    config_file("x = 1\n", "my.py: it defines no get_config()"),
    config_file("import nothing_of_that_name\n", "my.py, line 1: ModuleNotFoundError"),
    config_file("", "my.py: it defines no get_config()"),
    config_file("def get_config(:\n", "SyntaxError"),
    config_file("\0", "my.py"),
    config_file(SET.format("config.unlock(); del config.plan"), "the config lacks plan.groups_per_step"),
    config_file(SET.format("config = defaults('bt')"), "there is no objective 'bt'"),
    config_file(SET.format("config = defaults()"), "config.model.init_from is empty"),
    config_file(SET.format("config.model.scratch = {'model_type': 'gpt2'}"), "model_type 'gpt2' is not supported"),
    config_file(SET.format("config.model.scratch.model_type = 'bert'"), "model_type 'bert' is not supported"),
    config_file(SET.format("config.model.scratch.num_attention_heads = 3"), "num_attention_heads 3"),
    config_file(SET.format("config.model.scratch.hidden_size = 0"), "lacks hidden_size"),
    config_file(SET.format("config.model.scratch.hidden_size = -64"), "hidden_size"),
    config_file(SET.format("config.optim.decays = ((r'(', True),)"), "config.optim.decays"),
    config_file(SET.format("config.optim.decays = ((r'nothing', True),)"), "decays"),
    config_file(SET.format("config.optim.freezes = ((r'.*', True),)"), "config.optim.freezes freezes every parameter"),
    config_file(SET.format("config.optim.lr_factors = ((r'.*', 1.0), (r'x', 2.0))"), "config.optim.lr_factors"),
]
# Those that are about the model and the optimizer need data, too.
CONFIG_FILES = [
    dataclasses.replace(case, command=(*case.command, "--config.data.train=synthetic://pairs?n=50"))
    if b"demo()" in case.files["my.py"]
    else case
    for case in CONFIG_FILES
]


def data_file(name: str, contents: bytes, says: str, *more: str, command: str = "inspect", **files: bytes) -> Case:
    """A file of data."""
    source = more[0] if more and not more[0].startswith("--") else name
    rest = [x for x in more if x.startswith("--")]
    rest += ["--output=out.parquet", "--on_bad_row=error"] if command == "convert" else []
    given = {**({name: contents} if name else {}), **{key.replace("__", "."): x for key, x in files.items()}}
    return Case(f"{command} {name} {source}: {says}", ("rmjax.data", command, source, *rest), says, given)


GOOD = lines(*PAIRS)
_R = format_rows.ROWS
FILES = [
    data_file("a.jsonl", b"", "a.jsonl has no rows"),
    data_file("a.jsonl", b"\n\n\n", "a.jsonl has no rows"),
    data_file("a.jsonl", GOOD + b"{\n", "a.jsonl, line 4: not JSON"),
    data_file("a.jsonl", GOOD + b"[1, 2]\n", "a.jsonl, line 4 is a list"),
    data_file("a.jsonl", GOOD + b"null\n", "a.jsonl, line 4 is a NoneType"),
    data_file("a.jsonl", GOOD + b'{"prompt": "\xff\xfe"}\n', "a.jsonl cannot be read as .jsonl"),
    data_file("a.jsonl", GOOD + b"[" * 200_000 + b"\n", "a.jsonl, line 4: not JSON"),
    data_file("a.jsonl", GOOD + b'{"prompt": ' + b"9" * 5000 + b"}\n", "a.jsonl, line 4"),
    data_file("a.jsonl", b"<html><body>Not Found</body></html>\n", "a.jsonl, line 1: not JSON"),
    data_file("a.jsonl", b"prompt,chosen,rejected\nq,a,b\n", "a.jsonl, line 1: not JSON"),
    data_file("a.jsonl", b"PAR1" + bytes(range(128, 256)), "a.jsonl cannot be read"),
    data_file("a.jsonl.gz", gzip.compress(GOOD)[:-12], "a.jsonl.gz cannot be read"),
    data_file("a.jsonl.gz", GOOD, "a.jsonl.gz cannot be read"),
    data_file("a.jsonl.gz", gzip.compress(GOOD)[:20] + b"\0" * 40, "a.jsonl.gz cannot be read"),
    data_file("a.jsonl.gz", b"", "a.jsonl.gz has no rows"),
    data_file("a.json", b"", "a.json: not JSON"),
    data_file("a.json", b"[1, 2]", "a.json, item 0 is a int"),
    data_file("a.json", b"[]", "a.json has no rows"),
    data_file("a.json", b"17", "a.json holds a int"),
    data_file("a.json", b"{}", "a.json is one object"),
    data_file("a.json", b'{"a": [1, 2], "b": [1]}', "a.json is one object"),
    data_file("a.json", b'{"prompt": "q", "chosen": "a", "rejected": "b"}', "a.json is one object"),
    data_file("a.json", b'[\n{"a": 1},\n]', "a.json, line 3: not JSON"),
    data_file("a.json", b"[" * 200_000, "a.json"),
    data_file("a.json", b"\xff\xff", "a.json cannot be read as .json"),
    data_file("a.json", b"[" + b"9" * 5000 + b"]", "a.json"),
    data_file("a.parquet", b"", "a.parquet cannot be read as .parquet"),
    data_file("a.parquet", b"PAR1 and no more", "a.parquet cannot be read as .parquet"),
    data_file("a.parquet", parquet(*PAIRS)[:-20], "a.parquet cannot be read as .parquet"),
    data_file("a.parquet", parquet(*PAIRS)[:40] + bytes(100) + parquet(*PAIRS)[140:], "a.parquet"),
    data_file("a.parquet", GOOD, "a.parquet cannot be read as .parquet"),
    data_file("a.arrow", b"", "a.arrow"),
    data_file("a.arrow", b"ARROW1\0\0" + bytes(64), "a.arrow cannot be read as .arrow"),
    data_file("a.arrow", bytes(range(200)), "a.arrow cannot be read as .arrow"),
    data_file("a.csv", b"prompt,chosen\n", "a.csv: unknown kind of file"),
    data_file("a.txt.gz", gzip.compress(b"x"), "a.txt.gz: unknown kind of file"),
    data_file("", b"", "gone.jsonl: no such file", "gone.jsonl"),
    data_file("", b"", "no data was named", ","),
    data_file("", b"", "unknown scheme s4://", "s4://bucket/a.jsonl"),
    data_file("", b"", "gone.db", "sqlite:///gone.db?table=t"),
    data_file("a.db", b"not a database at all, but text", "a.db", "sqlite:///a.db?table=t"),
    data_file("a.db", b"", "has no table 't'", "sqlite:///a.db?table=t"),
    data_file("a.db", b"", "name a table with ?table=NAME", "sqlite:///a.db"),
    data_file("a.db", b"", "sqlite:///a.db", "sqlite:///a.db?query=SELECT nothing FROM nowhere"),
    data_file("", b"", "://", "postgresql://me:pa55word@127.0.0.1:1/db?table=t"),
    data_file("a.jsonl", GOOD, "expected several files", "aligned://a.jsonl"),
    data_file("a.jsonl", GOOD, "b.jsonl: no such file", "aligned://a.jsonl+b.jsonl"),
    data_file("a.jsonl", b'"q"\n"q"\n', "equally many rows", "aligned://a.jsonl+b.jsonl", b__jsonl=b'["x", "y"]\n'),
    data_file("a.jsonl", b"3\n", "a.jsonl, line 1 is '3'", "aligned://a.jsonl+b.jsonl", b__jsonl=b'["x"]\n'),
    data_file("a.jsonl", b'"q"\n', "differ in 'prompt'", "aligned://a.jsonl+b.jsonl", b__jsonl=b'{"prompt": "r"}\n'),
    data_file("d_train.jsonl", GOOD, "holds several splits", ".", d_test__jsonl=GOOD),
    data_file("a.jsonl", GOOD, "holds files of several kinds", ".", b__parquet=parquet(*PAIRS)),
    data_file("notes.txt", b"x", "is a directory without any file", "."),
    data_file("a.jsonl", lines({"question": "q", "good": "a", "bad": "b"}), "unknown data format"),
    data_file("a.jsonl", lines({"prompt": "q", "chosen": "a"}), "'rejected'"),
    data_file("a.jsonl", lines({"prompt": "q", "chosne": "a", "rejected": "b"}), "did you mean 'chosne'?"),
    data_file("a.jsonl", lines({"prompt": 1, "chosen": 2, "rejected": 3}), "a.jsonl: unknown data format"),
    data_file("a.jsonl", GOOD, "ranked needs a column 'responses'", "--format=ranked"),
    data_file("a.jsonl", lines({}), "a.jsonl: unknown data format"),
    data_file("a.jsonl", lines({**PAIR, "preference": 0}, {**PAIR, "preference": 2}), "preference runs from 0 to 2"),
    data_file("a.jsonl", lines({**PAIR, "margin": "much"}), "column 'margin' is wrong throughout"),
    data_file(
        "a.jsonl",
        lines({"chosen": '[{"role": "user"}]', "rejected": '[{"role": "user"}]'}),
        "conversations as text",
    ),
    data_file("a.jsonl", lines(PAIR, format_rows.ROWS["messages"]), "ambiguous data format"),
    data_file("a.jsonl", lines({"chosen": "a", "rejected": "b"}, _R["pair_transcript"]), "the rows do not agree"),
]


def row(name: str, bad: Any, says: str, *more: str) -> Case:
    """A row that is wrong, after two that are not."""
    good = {**format_rows.ROWS, **format_rows.NAMED}[name]
    named = [f"--format={name}", *more]
    case = data_file("rows.jsonl", lines(good, good, bad), says, *named, command="convert")
    return dataclasses.replace(case, name=f"{name}: {says} {json.dumps(bad)[:80]}")


def first_column(name: str) -> Case:
    """A row whose first column has a cell that no format takes."""
    good = format_rows.ROWS[name]
    column = next(iter(FIRST.get(name, good)))
    bad = {**good, column: {"of": 17}} if name != "records" else {**good, column: 17}
    return row(name, bad, f"rows.jsonl:2: {column} is ")


FIRST = {  # a column that the format needs, where the first is none
    "strength_pair": ("prompt",),
    "strength_chat": ("context",),
    "ultrafeedback": ("completions",),
    "ranked_tree": ("prompt",),
    "prm800k": ("question",),
    "label_studio": ("annotations",),
    "pair_conversations": ("conversations",),
}
ROWS = [
    *map(first_column, _R),
    row("pair_text", {**PAIR, "chosen": ""}, "rows.jsonl:2: the last assistant turn has no text"),
    row("pair_text", {**PAIR, "rejected": "yes"}, "rows.jsonl:2: responses 1 and 2 of 2 are the same"),
    row("pair_text", {**PAIR, "chosen": "\ud800"}, "rows.jsonl:2: the assistant's content is no Unicode"),
    row("pair_text", {**PAIR, "tools": "{"}, "rows.jsonl: column 'tools' is wrong throughout"),
    row("pair_text", {**PAIR, "system": 5}, "rows.jsonl: column 'system' is wrong throughout"),
    row("pair_text", {**PAIR, "weight": -1}, "rows.jsonl: column 'weight' is wrong throughout"),
    row("pair_text", {**PAIR, "margin": 10**400}, "rows.jsonl: column 'margin' is wrong throughout"),
    row("pair_text", {**PAIR, "preference": -0.5}, "rows.jsonl:2: preference -0.5 is outside [0, 1]"),
    row("pair_transcript", {"chosen": "hello", "rejected": "\n\nHuman: x\n\nAssistant: y"}, "must begin with 'Human:'"),
    row("pair_transcript", {**_R["pair_transcript"], "chosen": "\n\nHuman: q"}, "rows.jsonl:2: the conversation ends"),
    row("pair_messages", {**_R["pair_messages"], "chosen": [{"content": "x"}]}, "rows.jsonl:2"),
    row("pair_messages", {**_R["pair_messages"], "chosen": [{"role": "king", "content": "x"}]}, "rows.jsonl:2"),
    row("pair_messages", {**_R["pair_messages"], "chosen": [{"role": "user", "content": "x"}]}, "ends with user"),
    row("pair_messages", {**_R["pair_messages"], "chosen": [format_rows.assistant(None)]}, "rows.jsonl:2"),
    row("scored_text", {**_R["scored_text"], "verbosity": "very"}, "rows.jsonl:2: verbosity is str 'very'"),
    row("scored_output", {**_R["scored_output"], "output": [{"content": "x"}]}, "has no object `label`"),
    row("boolean", {**_R["boolean"], "label": "yes"}, "rows.jsonl:2: label is str 'yes'"),
    row("nemo_text", {**_R["nemo_text"], "label": [1, 2]}, "label has 2 numbers, expected 9"),
    row("judged_pair", {**_R["judged_pair"], "metadata": {"preferred": "C"}}, "metadata.preferred is str 'C'"),
    row("judged_pair", {**_R["judged_pair"], "output": [{"content": "x"}]}, "output has 1 responses"),
    row("annotated_pair", {**_R["annotated_pair"], "annotator1": 3}, "an annotator's vote is int 3"),
    row(
        "annotated_pair", {k: v for k, v in _R["annotated_pair"].items() if "annotator" not in k}, "no annotator voted"
    ),
    row("ranked", {**_R["ranked"], "ranks": [1]}, "1 ranks for 4 responses"),
    row("ranked", {**_R["ranked"], "responses": []}, "4 scores for 0 responses"),
    row("ranked_answers", {**_R["ranked_answers"], "answers": [{"answer": "a"}]}, "rows.jsonl:2"),
    row(
        "ranked_tree", {**_R["ranked_tree"], "prompt": {"text": "q", "role": "prompter", "replies": 3}}, "rows.jsonl:2"
    ),
    row("comparisons", {**_R["comparisons"], "preference": [1, 2]}, "rows.jsonl:2"),
    row("comparisons", {**_R["comparisons"], "preference": [1, 2, 0, 1, 2, 7]}, "rows.jsonl:2"),
    row("labelled_responses", {**_R["labelled_responses"], "rewards": [1]}, "rows.jsonl:2"),
    row("stepwise", {**_R["stepwise"], "labels": [True]}, "rows.jsonl:2"),
    row("stepwise", {**_R["stepwise"], "labels": [2, 3, 4]}, "rows.jsonl:2"),
    row("shepherd_text", {**_R["shepherd_text"], "label": "other"}, "rows.jsonl:2"),
    row("strength_pair", {**_R["strength_pair"], "preference_strength": 9}, "preference_strength is int 9"),
    row("ultrafeedback", {**_R["ultrafeedback"], "completions": []}, "rows.jsonl:2"),
    row("unieval", {**_R["unieval"], "scores": {"overall": "good"}}, "overall is str 'good'"),
    row("prometheus", {**_R["prometheus"], "instruction": "rate it"}, "instruction has no '###The instruction"),
    row("prometheus_judge", {**_R["prometheus"], "gpt4_score": [1.5, 2, 3]}, "a rating is float 1.5"),
    row("prometheus_judge", {**_R["prometheus"], "gpt4_score": [2]}, "3 feedbacks for 1"),
    row("prm800k", {**_R["prm800k"], "label": {"steps": []}}, "no step of the solution is rated"),
    row("prm800k", {**_R["prm800k"], "label": {"steps": [{"completions": 3, "chosen_completion": 0}]}}, "rows.jsonl:2"),
    row("label_studio", {**_R["label_studio"], "data": {"prompt": "q", "response_2": "x"}}, "one `response`, or"),
    row("label_studio", {**_R["label_studio"], "data": {"response": "x"}}, "data has no prompt"),
    row("records", {**_R["records"], "wins": [[0, 1]]}, "rows.jsonl:2: wins is list"),
    row("records", {**_R["records"], "steps": [[{"stop": 3}]]}, "rows.jsonl:2"),
    row("messages", {"messages": []}, "rows.jsonl:2: messages is list []"),
]

CASES = [*ARGUMENTS, *KEYS, *CONFIG_FILES, *FILES, *ROWS]

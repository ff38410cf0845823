"""Broken models for the public commands: checkpoints, weights, config.json, tokenizers, templates, contracts; and rows
to score. See bad_inputs.py."""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bad_inputs import GOOD, SMALL, TINY, Case, lines, parquet
from safetensors.numpy import save_file

ROW = {"prompt": "What is a tree?", "response": "A plant."}
SCORE = ("rmjax.score", "--model=model", "--input=in.jsonl", "--output=new/out.jsonl")
TRAIN = (
    *("rmjax.main", TINY, "--workdir=run", "--config.model.init_from=model", "--config.model.tokenizer="),
    *(f"--config.data.train=synthetic://{SMALL}", "--config.data.validation=", "--config.duration=2 steps"),
)
SHOW = ("rmjax.data", "inspect", "pairs.jsonl", "--tokenizer=model")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], Any]


def model(says: str, change: Change, command: tuple[str, ...] = SCORE, name: str = "", rows: Any = (ROW,)) -> Case:
    """A model's directory that was changed."""

    def make(here: Path, assets: Mapping[str, Path]) -> None:
        shutil.copytree(assets["model"], here / "model")
        change(here / "model")

    label = f"{command[0]} {name or says}"
    return Case(label, command, says, {"in.jsonl": lines(*rows), "pairs.jsonl": GOOD}, make)


def write(name: str, contents: bytes | str) -> Change:
    """Writes a file of the model anew."""
    return lambda at: (at / name).write_bytes(contents.encode() if isinstance(contents, str) else contents)


def edit(name: str, **values: Any) -> Change:
    """Changes values of a JSON file; None takes one out."""

    def change(at: Path) -> None:
        there = json.loads((at / name).read_text())
        kept = {key: value for key, value in {**there, **values}.items() if value is not None}
        (at / name).write_text(json.dumps(kept))

    return change


def remove(*names: str) -> Change:
    """Deletes files."""
    return lambda at: [(at / name).unlink() for name in names]


def both(*changes: Change) -> Change:
    """Several changes."""
    return lambda at: [change(at) for change in changes]


def header(change: Callable[[dict], Any]) -> Change:
    """Changes the header of the weights; what stands behind it stays."""

    def rewrite(at: Path) -> None:
        raw = (at / WEIGHTS).read_bytes()
        stop = 8 + struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8:stop])
        changed = change(entries)
        text = json.dumps(entries if changed is None else changed).encode()
        (at / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[stop:])

    return rewrite


def raw(change: Callable[[bytes], bytes]) -> Change:
    """Changes the bytes of the weights."""
    return lambda at: (at / WEIGHTS).write_bytes(change((at / WEIGHTS).read_bytes()))


def indexed(weight_map: Any) -> Change:
    """Weights by an index."""
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    return both(lambda at: (at / WEIGHTS).rename(at / "one.safetensors"), write(INDEX, text))


def broken_index(text: str | bytes) -> Change:
    """An index without a single file beside it, which would be taken first."""
    return both(remove(WEIGHTS), write(INDEX, text))


def template(text: str) -> Change:
    """Another chat template, without the contract that would refuse it first."""
    return both(remove("reward_contract.json"), write("chat_template.jinja", text))


def renamed(old: str, new: str) -> Change:
    """Gives a tensor another name."""
    return header(lambda entries: entries.update({new: entries.pop(old)}))


def adapter(**values: Any) -> Change:
    """The adapter_config.json of an adapter of o/n."""
    terms = {"peft_type": "LORA", "r": 4, "task_type": "SEQ_CLS", "base_model_name_or_path": "o/n", **values}
    return write("adapter_config.json", json.dumps(terms))


def adapter_of_base(inputs: int, *changes: Change) -> Change:
    """The model becomes `base`, which is changed, and its directory that of an adapter of kernels of so many inputs."""

    def change(at: Path) -> None:
        at.rename(base := at.with_name("base"))
        at.mkdir()
        both(*changes)(base)
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        halves = {"lora_A": np.zeros((4, inputs), np.float32), "lora_B": np.zeros((64, 4), np.float32)}
        save_file({f"{module}.{half}.weight": x for half, x in halves.items()}, at / "adapter_model.safetensors")
        adapter(base_model_name_or_path="base")(at)

    return change


EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


def entry(name: str, **values: Any) -> Change:
    """Changes the header's entry of one tensor."""
    return header(lambda entries: entries[name].update(values))


WEIGHT_FILES = [
    model("model/model.safetensors cannot be read", raw(lambda x: x[:-100]), name="truncated weights"),
    model("model/model.safetensors cannot be read", raw(lambda x: b""), name="empty weights"),
    model("model/model.safetensors cannot be read", raw(lambda x: x[:5]), name="five bytes of weights"),
    model("model/model.safetensors cannot be read", raw(lambda x: b"\xff" * 8 + x[8:]), name="a header of 2**64 bytes"),
    model("model/model.safetensors cannot be read", raw(lambda x: x[:8] + b"x" + x[9:]), name="a header of no JSON"),
    model(
        "model/model.safetensors cannot be read", raw(lambda x: x[:8] + b"\xff" + x[9:]), name="a header of no UTF-8"
    ),
    model("model/model.safetensors cannot be read", raw(lambda x: x + b"more"), name="bytes behind the weights"),
    model("model/model.safetensors cannot be read", header(lambda x: [x]), name="a header that is a list"),
    model(
        "model/model.safetensors cannot be read", entry(NORM, data_offsets=[0, 1 << 60]), name="offsets behind the end"
    ),
    model("model/model.safetensors cannot be read", entry(NORM, data_offsets=[-8, 0]), name="negative offsets"),
    model("model/model.safetensors cannot be read", entry(NORM, shape=[1 << 40, 1 << 40]), name="an overflowing shape"),
    model("model/model.safetensors cannot be read", entry(NORM, shape=["64"]), name="a shape of text"),
    model("model/model.safetensors cannot be read", entry(NORM, dtype="F31"), name="an unknown dtype"),
    model("model.norm.weight I32, expected one of F32", entry(NORM, dtype="I32")),
    model("model.norm.weight [32, 2], expected [64]", entry(NORM, shape=[32, 2])),
    model("1 unknown:\n    model.norm.weigth", header(lambda x: x.update({"model.norm.weigth": x.pop(NORM)}))),
    model("no score.weight in its weights", header(lambda x: x.update(other=x.pop("score.weight")))),
    model(
        "has another norm than in the score contract",
        raw(lambda x: x[:-9] + bytes([x[-9] ^ 64]) + x[-8:]),
        name="a flipped bit",
    ),
    model(
        "has another norm than in the score contract",
        raw(lambda x: x[:-4] + b"\0\0\xc0\x7f"),
        name="a weight that is no number",
    ),
    model("pickled weights are not read", lambda at: (at / WEIGHTS).rename(at / "pytorch_model.bin")),
    model("pickled weights are not read", lambda at: (at / WEIGHTS).rename(at / "model.pt"), TRAIN),
    model("model is an adapter of 'o/n', which cannot be had", both(remove(WEIGHTS, "config.json"), adapter())),
    model("model is an adapter of 'o/n', which cannot be had", both(remove(WEIGHTS, "config.json"), adapter()), TRAIN),
    model("delete adapter_config.json if model.safetensors is the merged model", adapter()),
    model("peft_type 'IA3'; only LORA is read", both(remove(WEIGHTS), adapter(peft_type="IA3"))),
    model("LoRA adapter with use_dora=True, which is not read", both(remove(WEIGHTS), adapter(use_dora=True)), TRAIN),
    model("does not fit its base: model.layers.0.self_attn.q_proj: [4, 99]", adapter_of_base(99)),
    model(
        "is a SEQ_CLS adapter without a head of this many labels",
        adapter_of_base(64, renamed("score.weight", "lm_head.weight")),
        TRAIN,
    ),
    model("r is 0, expected a rank of at least 1", both(remove(WEIGHTS), adapter(r=0))),
    model(
        "config.lora.targets: 'decoder/.*/queries' matches no kernel of a layer",
        lambda at: None,
        (*TRAIN, "--config.lora.rank=4", "--config.lora.targets=('decoder/.*/queries',)"),
    ),
    model(
        "config.lora.base='int4' is none of",
        lambda at: None,
        (*TRAIN, "--config.lora.rank=4", "--config.lora.base=int4"),
    ),
    model(
        "config.optim.freezes leaves decoder/embed/embedding to be trained, and config.lora freezes the base",
        lambda at: None,
        (
            *TRAIN,
            "--config.lora.rank=4",
            "--config.optim.freezes=(('.*embedding', False), ('.*/lora_.', False), ('.*', True))",
        ),
    ),
    model(
        "config.optim.name='muon' steps kernels, which config.lora freezes",
        lambda at: None,
        (*TRAIN, "--config.lora.rank=4", "--config.optim.name=muon"),
    ),
    model("config.lora.rank=0 must be at least 1", lambda at: None, (*TRAIN, "--config.lora.rank=0")),
    model("config.lora.alpha=8.0 does nothing without", lambda at: None, (*TRAIN, "--config.lora.alpha=8")),
    model("config.model.base='x' is for adapters", lambda at: None, (*TRAIN, "--config.model.base=x")),
    model("config.export.adapter needs config.lora.rank", lambda at: None, (*TRAIN, "--config.export.adapter=True")),
    model("GGUF files are weights quantized", both(remove(WEIGHTS), write("q4.gguf", "GGUF"))),
    model("GGUF files are weights quantized", both(remove("config.json"), write("q4.gguf", "GGUF")), TRAIN),
    model(
        "value_head.safetensors is a value head of TRL",
        both(renamed("score.weight", "lm_head.weight"), write("value_head.safetensors", "")),
    ),
    model("v_head.summary.weight is a head of another kind", renamed("score.weight", "v_head.summary.weight")),
    model("has neither model.safetensors nor", remove(WEIGHTS)),
    model("lacks two.safetensors, which its", indexed({EMBED: "one.safetensors", NORM: "two.safetensors"})),
    model("'../one.safetensors'", indexed({EMBED: "../one.safetensors"})),
    model("'/etc/passwd'", indexed({EMBED: "/etc/passwd"})),
    model("'a/../../b.safetensors'", indexed({EMBED: "a/../../b.safetensors"})),
    model("'pytorch_model.bin'", indexed({EMBED: "pytorch_model.bin"}), name="an index of pickled weights"),
    model("model.safetensors.index.json", indexed(["one.safetensors"]), name="an index that is a list"),
    model("model.safetensors.index.json", indexed({EMBED: 3}), name="an index of numbers"),
    model("model.safetensors.index.json", broken_index("{"), name="an index that is no JSON"),
    model("model.safetensors.index.json", broken_index("{}"), name="an index without weight_map"),
    model(
        "model.safetensors.index.json",
        both(remove(WEIGHTS), write(INDEX, b"\xff\xfe")),
        name="an index that is no text",
    ),
    model("cannot be read", raw(lambda x: x[:-100]), TRAIN, name="truncated weights"),
]

CONFIGS = [
    model("has no config.json", remove("config.json")),
    model("model/config.json is not valid JSON", write("config.json", "{'a': 1}")),
    model("model/config.json", write("config.json", b"\xff\xfe\xfd"), name="config.json is no text"),
    model("model/config.json", write("config.json", "[]"), name="config.json is a list"),
    model("model/config.json", write("config.json", ""), name="config.json is empty"),
    model("model_type 'bert' is not supported", edit("config.json", model_type="bert")),
    model("model_type 'None' is not supported", edit("config.json", model_type=None)),
    model("lacks hidden_size", edit("config.json", hidden_size=None)),
    model("hidden_size '64'", edit("config.json", hidden_size="64")),
    model("hidden_size -64", edit("config.json", hidden_size=-64)),
    model("num_hidden_layers 2.5", edit("config.json", num_hidden_layers=2.5)),
    model("num_attention_heads 2 must be a multiple", edit("config.json", num_key_value_heads=3)),
    model("is quantized", edit("config.json", quantization_config={"bits": 4})),
    model("hidden_act 'gelu' is not supported", edit("config.json", hidden_act="gelu")),
    model("RoPE type 'dynamic' is not supported", edit("config.json", rope_scaling={"rope_type": "dynamic"})),
    model("unknown RoPE type 'spiral'", edit("config.json", rope_scaling={"rope_type": "spiral"})),
    model("'linear' needs factor", edit("config.json", rope_scaling={"rope_type": "linear"})),
    model("RoPE parameters by layer type", edit("config.json", rope_scaling={"full": {"rope_type": "default"}})),
    model("rope_theta", edit("config.json", rope_parameters=None, rope_scaling=None, rope_theta="high")),
    model("layer_types has 1 entries", edit("config.json", layer_types=["full_attention"])),
    model("do not fit its config", edit("config.json", num_hidden_layers=3), name="a layer too many"),
    model("do not fit its config", edit("config.json", num_hidden_layers=3), TRAIN, name="a layer too many"),
    model("do not fit its config", edit("config.json", model_type="qwen3"), name="another family"),
    model("do not fit its config", edit("config.json", intermediate_size=100), name="another width"),
    model("rms_norm_eps", edit("config.json", rms_norm_eps="small")),
    model("id2label", edit("config.json", id2label={"first": "a"})),
    model("id2label", edit("config.json", id2label=["a"]), name="id2label is a list"),
]

CLOCK = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
EACH = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TOKENIZERS = [
    model("no such directory", lambda at: None, (*SCORE[:1], "--model=nowhere", *SCORE[2:]), name="no model"),
    model("model", lambda at: shutil.rmtree(at), name="no directory"),
    model("there are no tokenizer files in", remove("tokenizer.json", "tokenizer_config.json"), SHOW),
    model("tokenizer of model cannot be read", write("tokenizer.json", "{"), SHOW, "tokenizer.json is no JSON"),
    model("tokenizer of model cannot be read", write("tokenizer.json", "{}"), SHOW, "tokenizer.json is empty"),
    model("tokenizer of model cannot be read", write("tokenizer.json", "[1]"), SHOW, "tokenizer.json is a list"),
    model("tokenizer of model cannot be read", write("tokenizer.json", b"\xff"), SHOW, "tokenizer.json is no text"),
    model("tokenizer of model cannot be read", write("tokenizer.json", "{"), SCORE, "tokenizer.json is no JSON"),
    model("tokenizer of model cannot be read", write("tokenizer.json", "{"), TRAIN, "tokenizer.json is no JSON"),
    model(
        "tokenizer of model cannot be read", edit("tokenizer.json", model={"type": "Magic"}), SHOW, "an unknown model"
    ),
    model(
        "tokenizer of model cannot be read", write("tokenizer_config.json", "{"), SHOW, "tokenizer_config is no JSON"
    ),
    model(
        "tokenizer of model cannot be read", write("tokenizer_config.json", "[]"), SHOW, "tokenizer_config is a list"
    ),
    model("has no chat template", remove("chat_template.jinja"), SHOW),
    model("has no chat template", both(remove("chat_template.jinja", "reward_contract.json")), SCORE),
    model("cannot render a plain conversation", template("{% for m in messages %}"), SHOW, "a loop without an end"),
    model("cannot render a plain conversation", template("{{ messages | nothing }}"), SHOW, "an unknown filter"),
    model("cannot render a plain conversation", template("{{ raise_exception('not you') }}"), SHOW, "it refuses"),
    model("not you", template("{{ raise_exception('not you') }}"), SCORE),
    model("cannot render a plain conversation", template("{{ messages[9].content }}"), SHOW, "a message too many"),
    model("cannot render a plain conversation", template("{{ 1 / 0 }}"), SHOW, "a division by zero"),
    model(
        "cannot render a plain conversation", template("{% for i in range(10**9) %}{% endfor %}"), SHOW, "a long loop"
    ),
    model("SecurityError", template("{{ messages.__class__.__mro__ }}" + EACH), SHOW, "access to attributes"),
    model("cannot render", template("{{ ''.__class__.__base__.__subclasses__() }}" + EACH), SHOW, "access to classes"),
    model("cannot render", template("{{ messages.append(1) }}" + EACH), SHOW, "it changes what it is given"),
    model("cannot render", template("{% include 'x' %}" + EACH), SHOW, "it includes a file"),
    model("inserts today's date", template(CLOCK), SHOW),
    model("inserts today's date", template(CLOCK), TRAIN),
    model("has no chat template", template(""), SHOW, "an empty template"),
    model(
        "the tokenizer has no unused reserved token",
        edit("tokenizer_config.json", pad_token="<|endoftext|>", eos_token="<|endoftext|>"),
        TRAIN,
    ),
]

CONTRACT = "reward_contract.json"
PAIR_OF_MODELS = (*SCORE[:1], "--model=model,{model}", *SCORE[2:])
CONTRACTS = [
    model("they differ in the chat template", template(EACH + "x"), PAIR_OF_MODELS),
    model("compares two responses", edit(CONTRACT, objective={"name": "pairwise"}), PAIR_OF_MODELS),
    model("no score contract", remove(CONTRACT), (*PAIR_OF_MODELS, "--normalize"), name="a member to normalize"),
    model(f"{CONTRACT} is not JSON", write(CONTRACT, "{")),
    model(f"{CONTRACT} is of version 99", edit(CONTRACT, version=99)),
    model(f"{CONTRACT} is of version 'list'", write(CONTRACT, "[]")),
    model(f"{CONTRACT} ", write(CONTRACT, b"\xff\xfe"), name="the contract is no text"),
    model(f"{CONTRACT} lacks golden", edit(CONTRACT, golden=None)),
    model(f"{CONTRACT} lacks objective", edit(CONTRACT, objective=None)),
    model("config.objective.name='magic' is unknown", edit(CONTRACT, objective={"name": "magic"})),
    model(
        "has colour, which 'bradley_terry' has not", edit(CONTRACT, objective={"name": "bradley_terry", "colour": 1})
    ),
    model("its scored token is 'the first'", edit(CONTRACT, scored_token="the first")),
    model("the tokenizer's chat template is not the one", write("chat_template.jinja", EACH + "x")),
    model(
        "golden row 0 scores",
        edit(CONTRACT, golden=[{"text": None, "token_ids": [5, 6], "at": [1], "outputs": [[9.0]]}]),
    ),
    model("golden", edit(CONTRACT, golden=[{"text": "x"}]), name="a golden row without tokens"),
    model("differ from the score contract's", lambda at: None, (*SCORE, '--template_kwargs={"a":1}')),
]


def scored(says: str, *rows: Any, flags: tuple[str, ...] = (), name: str = "", **files: bytes) -> Case:
    """Rows to score."""
    made = model(says, lambda at: None, (*SCORE, *flags), name or f"{says} {json.dumps(rows)[:60]}", rows)
    return Case(made.name, made.command, says, {**made.files, **files}, made.make)


SCORES = [
    scored("in.jsonl:1: it has no column 'response'", ROW, {"question": "q", "answer": "a"}),
    scored("it has none", ROW, {}),
    scored("in.jsonl:0 has a column `score` already", {**ROW, "score": 1}),
    scored("column 'system' is wrong throughout: text was expected", {**ROW, "system": ["be kind"]}, ROW),
    scored("in.jsonl:1: prompt is NoneType None, expected text", ROW, {**ROW, "prompt": None}),
    scored("response (int)", {**ROW, "response": 5}),
    scored("in.jsonl:1: response is int 5, expected text", ROW, {**ROW, "response": 5}),
    scored("in.jsonl:0: a message's role is str 'king'", {"messages": [{"role": "king", "content": "x"}]}),
    scored("in.jsonl:0: the conversation ends with user", {"messages": [{"role": "user", "content": "x"}]}),
    scored("to be scored without a label, a row needs `messages`", {"messages": ["hello"]}),
    scored("in.jsonl: unknown data format", {"messages": []}),
    scored("in.jsonl:0: the assistant's content is no Unicode", {**ROW, "response": "\ud800"}),
    scored("in.jsonl has no rows"),
    scored("no such file", ROW, flags=("--input=gone.jsonl",)),
    scored("--output=out.csv must end in", ROW, flags=("--output=out.csv",)),
    scored("--output=model must end in", ROW, flags=("--output=model",)),
    scored("is read as input", ROW, flags=("--output=in.jsonl",)),
    scored("--output=in.jsonl/out.jsonl", ROW, flags=("--output=in.jsonl/out.jsonl",)),
    scored("column `id` fits no Parquet column", {**ROW, "id": 1}, {**ROW, "id": "x"}, flags=("--output=o.parquet",)),
    scored("in.parquet cannot be read", ROW, flags=("--input=in.parquet",), **{"in.parquet": parquet(ROW)[:-9]}),
]


def run(says: str, change: Change, *flags: str, name: str = "") -> Case:
    """A run whose workdir was changed is started again."""

    def make(here: Path, assets: Mapping[str, Path]) -> None:
        shutil.copytree(assets["run"], here / "run")
        change(here / "run")

    return Case(f"run: {name or says}", (*RUN, "--workdir=run", *flags), says, {}, make)


RUN = (
    *("rmjax.main", TINY, f"--config.data.train=synthetic://{SMALL}", "--config.data.validation="),
    *("--config.duration=2 steps", "--config.eval.every=1 steps", "--config.log.to="),
)


def in_all_steps(change: Callable[[Path], Any]) -> Change:
    """Changes every checkpoint."""
    return lambda at: [change(step) for step in sorted((at / "checkpoints").iterdir()) if step.name.isdecimal()]


def largest(step: Path) -> Path:
    """The largest file of a checkpoint: of an array."""
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    """Flips a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def without_configs(at: Path) -> None:
    """Forgets the run's config, in the workdir and beside the checkpoints."""
    (at / "config.json").unlink()
    marker = at / "checkpoints" / ".rmjax.json"
    marker.write_text(json.dumps({name: x for name, x in json.loads(marker.read_text()).items() if name != "config"}))


RUNS = [
    run(
        "every checkpoint in", in_all_steps(lambda step: flip(largest(step))), name="a flipped bit in every checkpoint"
    ),
    run("every checkpoint in", in_all_steps(lambda step: largest(step).unlink()), name="a file of every one is gone"),
    run("every checkpoint in", in_all_steps(lambda step: largest(step).write_bytes(b"x")), name="every one truncated"),
    run(
        "manifest.json cannot be read",
        in_all_steps(lambda s: (s / "manifest.json").write_text("{")),
        name="no manifest",
    ),
    run("holds a run of another config", lambda at: None, "--config.seed=7"),
    run("config.plan.row_tokens: 512 before", lambda at: None, "--config.plan.row_tokens=256"),
    run("run/config.json", lambda at: (at / "config.json").write_text("{"), name="config.json is no JSON"),
    run("run/config.json", lambda at: (at / "config.json").write_text("[]"), name="config.json is a list"),
    run("run/config.json", lambda at: (at / "config.json").write_bytes(b"\xff"), name="config.json is no text"),
    run("config.optim.name: 'adamw' before", lambda at: (at / "config.json").unlink(), "--config.optim.name=adafactor"),
    run(
        "expected float32",
        without_configs,
        "--config.optim.name=adafactor",
        name="a checkpoint of other arrays",
    ),
]

UNMEASURED = Case(
    "a metric that is not measured",
    (*RUN, "--workdir=run", "--config.checkpoint.metric=validation/acuracy"),
    "config.checkpoint.metric='validation/acuracy' is not measured",
)
CASES = [*WEIGHT_FILES, *CONFIGS, *TOKENIZERS, *CONTRACTS, *SCORES, *RUNS, UNMEASURED]

"""The benchmark: its counts against transformers, XLA and brute force; its rates, turns, file and errors."""

import collections
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import quick
import transformers
from ml_collections import ConfigDict

from rmjax import config
from rmjax.batches import loader, packing
from rmjax.batches.random_groups import RandomGroups, read_lengths
from rmjax.benchmark import __main__ as benchmark
from rmjax.benchmark import side as measured
from rmjax.hardware import flops, topology
from rmjax.models import config as model_config
from rmjax.models import heads

ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def accelerator():
    """The script, as a module; what lies beside it is found as it is when it is started."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("accelerator", ROOT / "benchmarks" / "accelerator.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["accelerator"] = module  # its dataclasses look for themselves there
    spec.loader.exec_module(module)
    return module


def scorer(values):
    """A decoder's shape, and the structure and shapes of a Scorer on it."""
    model = model_config.from_hf({"model_type": "qwen2", **values})
    return model, *heads.abstract(model, 1)


def tiny(**keys):
    """A config of one layer, width 16, rows of 64 tokens."""
    tiny = config.demo()
    values = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny.model.scratch = ConfigDict({**tiny.model.scratch.to_dict(), **values, "vocab_size": 50})
    tiny.plan.row_tokens, tiny.plan.rows_per_step = 64, 2
    tiny.update_from_flattened_dict(keys)
    return tiny


def lengths_file(directory):
    """A file of lengths; its last pair is longer than a row of `tiny`."""
    path = directory / "lengths.json"
    triples = np.random.default_rng(0).integers(2, 12, (40, 3)).tolist()
    path.write_text(json.dumps([*triples, [60, 4, 4]]))
    return str(path)


@pytest.fixture
def lengths(tmp_path):
    return lengths_file(tmp_path)


# What is counted


def test_parameters_and_useful_flops_are_those_of_transformers_model():
    values = {**SIZES, "num_labels": 1, "pad_token_id": 0}
    theirs = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.for_model("qwen2", **values)
    )
    model, _, shapes = scorer(SIZES)
    body = sum(p.numel() for name, p in theirs.named_parameters() if "embed_tokens" not in name)
    assert sum(flops.parameters(shapes)) == body
    conversations = np.array([[7, 12], [100, 3]])
    attention = [sum(12 * 3 * 4 * 32 * n * n / 2 for n in row) for row in conversations]
    expected = 6 * body * conversations.sum(1) + attention
    np.testing.assert_allclose(flops.useful(model, shapes, conversations), expected, rtol=1e-12)


@pytest.mark.parametrize(("size", "billions"), [("0.5B", 0.36), ("1.5B", 1.31), ("7B-Instruct", 6.53)])
def test_known_shapes_have_the_parameters_that_their_model_cards_state(size, billions):
    keys = config.defaults()
    keys.model.init_from = f"Qwen/Qwen2.5-{size}"
    _, _, shapes = scorer(measured.model_values(keys))
    assert sum(flops.parameters(shapes)) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("window", [None, 5])
def test_visible_pairs_are_those_of_the_batch(window):
    groups = RandomGroups(np.array([[9, 4, 7], [1, 1, 1], [3, 12, 2], [20, 5, 6]]), 50)
    plan = packing.make_plan(groups.lengths, groups.ends, row_tokens=48, rows_per_step=2)
    shape = loader.plan_shape(plan, 2, micro_rows=2, row_devices=1, labels=groups.fields)
    batch = {name: x[0] for name, x in loader.StepSource(groups, plan, shape, range(shape.rows))[0].items()}
    assert plan.steps == 1
    i, j = np.arange(48)[:, None], np.arange(48)
    query, key = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
    sees = (query(batch["visible_from"]) <= j) & (j <= i) & (i < key(batch["visible_until"]))
    if window:
        sees &= query(batch["positions"]) - key(batch["positions"]) < window
    padding = 2 * 48 - groups.lengths.sum()  # each sees itself
    assert groups.visible_pairs(window).sum() == sees.sum() - padding


def test_hardware_flops_are_those_that_xla_counts():
    model, graph, shapes = scorer(SIZES)
    groups = RandomGroups(np.array([[40, 10, 13]]), 64)  # one row of 64 tokens, none of it padding
    plan = packing.make_plan(groups.lengths, groups.ends, row_tokens=64, rows_per_step=1)
    shape = loader.plan_shape(plan, 2, micro_rows=1, row_devices=1, labels=groups.fields)
    batch = {name: x[0] for name, x in loader.StepSource(groups, plan, shape, range(1))[0].items()}
    loss = lambda params, batch: heads.merge(graph, params)(batch, remat="none", scan=False).sum()
    counted = jax.jit(jax.grad(loss)).lower(shapes, batch).compile().cost_analysis()["flops"]
    ours = flops.hardware(model, shapes, groups.lengths, groups.ends, groups.visible_pairs)[0]
    attention = flops.attention(model, groups.visible_pairs)[0]
    # The row is one block of attention, which is computed whole, and its logits again in the backward pass: 7 products.
    whole = 7 * 2 * 64 * 64 * model.heads * model.head_dim * model.layers
    assert ours - attention + whole == pytest.approx(counted, rel=0.01)


def test_windows_bound_what_is_counted():
    assert flops.causal(np.array([3.0, 10.0]), 4).tolist() == [4.5, 32.0]  # the square of 10 less two of 6
    assert flops.causal(np.array([10.0]), None) == 50.0


def test_peaks_are_known_by_the_names_that_jax_gives_devices():
    known = {"NVIDIA A100-SXM4-80GB": 312, "TPU v5": 459, "TPU v5 lite": 197, "TPU v6 lite": 918, "TPU v4": 275}
    known |= {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835}
    assert {kind: flops.peak(kind) / 1e12 for kind in known} == known
    assert all(flops.peak(gpu.name) for gpu in topology.GPUS.values())
    assert flops.peak("cpu") is None


# Lengths and groups


@pytest.mark.parametrize(("name", "count", "means"), [("hh", 2307, (125, 41, 51)), ("long", 4000, (324, 463, 418))])
def test_packaged_lengths_are_what_is_said_of_them(name, count, means):
    triples = read_lengths(name)
    assert triples.shape == (count, 3)
    assert tuple(np.round(triples.mean(0)).astype(int)) == means


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1, 2]]", r"row 0 is \[1, 2\]; expected a JSON list of \[prompt, chosen, rejected\]"),
        ("[[1, 2, 3], [1, 0, 3]]", r"row 1 is \[1, 0, 3\]"),
        ("[[1, 2, 3.5]]", "row 0"),
        ("{}", "without rows"),
        ("1, 2", "is not JSON"),
    ],
)
def test_lengths_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "lengths.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_lengths(str(path))
    with pytest.raises(ValueError, match="there is no such file; give one, or hh or long"):
        read_lengths("hhh")


@pytest.mark.parametrize(("sizes", "window"), [([[9, 4, 7], [1, 1, 1]], None), ([[5, 4, 1, 9], [8, 2, 3, 3]], 4)])
def test_random_groups_have_the_lengths_that_they_promise(sizes, window):
    groups = RandomGroups(np.array(sizes), vocabulary=3)
    for i in range(2):
        group = groups.group(i)
        assert len(group.tree) == groups.lengths[i]
        assert [len(sequence) for sequence in group.tree.sequences()] == groups.conversations[i].tolist()
        assert np.array_equal(group.tree.tokens, groups.group(i).tree.tokens)
        assert np.array_equal(np.argwhere(group.labels["wins"]), np.argwhere(np.triu(group.labels["wins"], 1)))
        assert group.labels["wins"].sum() == math.comb(len(sizes[i]) - 1, 2)
        paths = [group.tree.path(int(end)) for end in group.tree.end]  # nodes, from the root on
        seen = {
            (path[q], path[k])
            for path in paths
            for q in range(len(path))
            for k in range(q + 1)
            if q - k < (window or 99)
        }
        assert groups.visible_pairs(window)[i] == len(seen)


# A run


def test_measured_steps_are_whole(lengths):
    side = measured.Side("A", tiny(), read_lengths(lengths), steps=60)
    assert side.left_out == 1 and side.plan.steps == 60 + measured.WARMUP
    assert {len(side.plan.rows(step)) for step in range(side.plan.steps)} == {2}
    work = side.done(5)
    groups = np.concatenate(side.plan.rows(5))
    assert work.pairs == len(groups) and work.tokens == side.groups.lengths[groups].sum()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The report on a config beside itself, and (side, step) in the order in which they were started."""
    path = lengths_file(tmp_path_factory.mktemp("lengths"))
    order, held, start = [], set(), measured.Side.start

    def watched(self, step):
        order.append((self.name, step))
        held.add(id(self._held))
        return start(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured.Side, "start", watched)
        report = benchmark.run([tiny(), tiny()], path, steps=5, peak=1e12)
    return SimpleNamespace(report=report, order=order, states=len(held), lengths=path)


def test_figures_of_a_side(compared):
    report = json.loads(json.dumps(compared.report, allow_nan=False))
    assert report["steps"] == 5 and report["peak_flops_per_s"] == 1e12
    assert report["device"] == {"kind": "cpu", "platform": "cpu", "count": 1}
    side, second = report["sides"][0], report["sides"][0]["step_s"]["median"]
    assert side["step_s"]["q1"] <= second <= side["step_s"]["q3"]
    plan = measured.Side("A", tiny(), read_lengths(compared.lengths), steps=5).plan
    groups = [i for step in range(measured.WARMUP, measured.WARMUP + 5) for row in plan.rows(step) for i in row]
    all_groups = RandomGroups(np.tile(read_lengths(compared.lengths)[:-1], (9, 1)), 50)
    tokens, unshared = (x[groups].sum() / 5 for x in (all_groups.lengths, all_groups.unshared))
    assert side["pairs_per_s"] * second == pytest.approx(len(groups) / 5)
    assert side["tokens_per_s"] * second == pytest.approx(tokens)
    assert side["unshared_tokens_per_s"] * second == pytest.approx(unshared)
    assert (side["micro_batches"], side["micro_batch_rows"], side["row_tokens"]) == (1, 2, 64)
    assert side["fill"] == pytest.approx(tokens / (2 * 64))
    assert side["mfu_useful"] == pytest.approx(side["useful_flops_per_s"] / 1e12)
    assert side["mfu_hardware"] < side["mfu_useful"]
    assert sum(side["split_s"].values()) == pytest.approx(second)
    assert min(side["split_s"]["attention"], side["split_s"]["optimizer"], side["data_wait_s"]) > 0
    assert side["memory_source"] == "compiler" and side["memory_bytes"] > 0 and side["compile_s"] > 0
    assert side["left_out"] == 1 and side["config"]["plan"]["row_tokens"] == 64
    table = benchmark.table(report)
    assert any(line.startswith("pairs/s") and f"{side['pairs_per_s']:,.1f}" in line for line in table)


def test_a_config_beside_itself(compared):
    assert compared.order == [(name, step) for step in range(5 + measured.WARMUP) for name in "AB"]
    assert compared.states == 1  # they are alike, so there is room for one
    ratio = compared.report["ratio"]
    assert ratio["q1"] <= ratio["median"] <= ratio["q3"]
    assert 0.3 < ratio["median"] < 3
    assert "B over A" in benchmark.table(compared.report)[-1]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_each_step_gets_its_own_time(monkeypatch, platform):
    """A device that does one thing after the other: steps of A take 3 seconds, those of B 5, what starts them 1 ms."""
    clock = SimpleNamespace(now=0.0, free=0.0)
    monkeypatch.setattr(measured.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(measured.jax, "block_until_ready", lambda end: setattr(clock, "now", max(clock.now, end)))
    running = []

    class Fake:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds
            device = SimpleNamespace(platform=platform)
            self.mesh = SimpleNamespace(devices=np.array([device], object))

        def start(self, step):
            running.append(clock.free - clock.now > 0.5)  # whether the device was still at work
            clock.now += 0.001
            clock.free = max(clock.free, clock.now) + self.seconds
            return clock.free, 0.001

        def done(self, step):
            return measured.Work(*[1.0] * 5)

    times = measured.take_turns([Fake("A", 3.0), Fake("B", 5.0)], steps=4)
    np.testing.assert_allclose(times[..., 0], [[3.0] * 4, [5.0] * 4], atol=0.01)
    assert all(running[1:]) == (platform == "gpu")


def test_ratios_are_of_pairs_per_second():
    pairs = {"A": 10.0, "B": 30.0}
    sides = [SimpleNamespace(done=lambda step, n=n: measured.Work(n, 0, 0, 0, 0)) for n in pairs.values()]
    times = np.array([[[1.0, 0], [2.0, 0]], [[1.0, 0], [3.0, 0]]])
    assert benchmark.ratios(sides, times).tolist() == [3.0, 2.0]


# What is wrong


def test_the_other_side_is_the_config_with_changes():
    first = tiny()
    other = benchmark.other_config(first, ["plan.row_tokens=128", "model.remat=q,k,v"])
    assert (other.plan.row_tokens, other.model.remat) == (128, "q,k,v")
    assert first.plan.row_tokens == 64
    other = benchmark.other_config(first, ["seed=3", str(ROOT / "configs" / "bt_qwen0_5b.py")])
    assert other.model.init_from == "Qwen/Qwen2.5-0.5B-Instruct" and other.seed == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["plan.row_token=1"],
            "--compare: there is no config key 'plan.row_token'; did you mean --config.plan.row_tokens",
        ),
        (["plan.row_tokens=many"], "--compare: .*row_tokens=many"),
        (["nothing.py"], "there is no config file 'nothing.py'"),
        (["a.py", "b.py"], "--compare names a.py and b.py; two sides"),
    ],
)
def test_changes_that_cannot_be_made(changes, message):
    with pytest.raises(ValueError, match=message):
        benchmark.other_config(tiny(), changes)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"plan.row_tokens": 6}, "no tree fits a row of 6 tokens .* they have"),
        ({"model.init_from": "nothing"}, "is no directory, and no Hub id"),
        ({"debug": True}, "config.debug compiles nothing"),
        ({"optim.learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"mesh.data": 3}, "config.mesh must multiply to 1"),
    ],
)
def test_configs_that_cannot_be_measured(lengths, keys, message):
    with pytest.raises(ValueError, match=message):
        measured.Side("A", tiny(**keys), read_lengths(lengths), steps=2)


def test_other_objectives_are_refused(lengths):
    with pytest.raises(ValueError, match=r"config.objective.name='prm'.*expected a config of 'bradley_terry'"):
        measured.Side("A", config.demo("prm"), read_lengths(lengths), steps=2)


def test_a_shape_that_cannot_be_downloaded_is_said_in_a_sentence(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network\nand more")

    monkeypatch.setattr(measured.huggingface_hub, "hf_hub_download", offline)
    keys = config.defaults()
    keys.model.init_from = "some/model"
    with pytest.raises(
        ValueError, match=r"'some/model'.*could not be had from the Hub \(no network\); give a directory"
    ):
        measured.model_values(keys)


def test_figures_are_not_written_through_a_link(tmp_path):
    (tmp_path / "figures.json").symlink_to(tmp_path / "target.json")
    with pytest.raises(ValueError, match=r"--json=.*figures\.json is a link to .*target\.json"):
        benchmark.output(str(tmp_path / "figures.json"))


def test_no_memory_left_is_said_in_a_sentence():
    text = benchmark.in_words(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nlong\nlonger"))
    assert "\n" not in text and "config.plan.micro_rows=1" in text
    assert benchmark.in_words(ValueError("other")) == "other"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config=FILE.py is required"),
        (["--config=configs/bt_tiny.py", "--config.plan.rowtokens=3"], "there is no config key 'plan.rowtokens'"),
        (["--config=configs/bt_tiny.py", "--steps=0"], "--steps=0"),
        (["--config=configs/bt_tiny.py", "steps=3"], "unexpected arguments"),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse(["benchmark", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_a_table_and_json(tmp_path):
    config_file, figures = ROOT / "configs" / "bt_tiny.py", tmp_path / "new" / "figures.json"
    command = [sys.executable, "-m", "rmjax.benchmark", f"--config={config_file}", "--lengths=hh", f"--json={figures}"]
    keys = ["--config.plan.row_tokens=256", "--config.plan.groups_per_step=4", "--steps=3"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": os.environ | {"XLA_FLAGS": quick.FLAGS}}
    done = subprocess.run([*command, *keys, "--compare=optim.name=adafactor"], **options)
    assert done.returncode == 0, done.stderr
    report = json.loads(figures.read_text())
    a, b = report["sides"]
    assert (a["config"]["optim"]["name"], b["config"]["optim"]["name"]) == ("adamw", "adafactor")
    assert f"{b['pairs_per_s']:,.1f}" in done.stdout and "B over A" in done.stdout
    alone = subprocess.run([*command, *keys], **options)
    assert alone.returncode == 0 and "B over A" not in alone.stdout
    assert json.loads(figures.read_text())["ratio"] is None
    failed = subprocess.run([*command, "--lengths=none"], **options)
    assert failed.returncode == 2 and "error: --lengths=none: there is no such file" in failed.stderr
    assert "Traceback" not in failed.stderr


# benchmarks/accelerator.py


def asked(script, workdir, *arguments):
    return script.parser().parse_args([f"--workdir={workdir}", *arguments])


def test_the_part_between_the_marks_is_rewritten():
    script = accelerator()
    page = script.PAGE.read_text()
    empty = script.page_part({}, {"a": "broke"}, "")
    assert empty.count(script.MISSING) > 66 and "`a` failed: broke" in empty
    changed = script.rewritten(page, empty)
    around = lambda text: (text.partition(script.BEGIN)[0], text.partition(script.END)[2])
    assert changed != page and empty in changed and around(changed) == around(page)
    with pytest.raises(ValueError, match="has lost the marks"):
        script.rewritten("nothing", empty)


@pytest.mark.parametrize("name", ["xla_gpu_enable_custom_fusions", "xla_gpu_enable_address_computation_fusion"])
def test_flags_that_abort_the_process_are_refused(tmp_path, monkeypatch, name):
    script = accelerator()
    with pytest.raises(ValueError, match=f"--{name} aborts the process"):
        script.run(asked(script, tmp_path, "--smoke", f"--xla_flag=--{name}=true"))
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=true")
    with pytest.raises(ValueError, match=f"--{name} aborts the process"):
        script.run(asked(script, tmp_path, "--smoke"))
    assert not any(name in flag for flag, _ in (*script.TRIED, *script.TRIED_ON_SEVERAL))


def test_without_an_accelerator_nothing_is_rewritten(tmp_path):
    script = accelerator()
    before = script.PAGE.read_text()
    with pytest.raises(ValueError, match="finds no accelerator here"):
        script.run(asked(script, tmp_path))
    assert script.PAGE.read_text() == before


def test_every_column_is_a_config_that_can_be_planned():
    script = accelerator()
    for column in script.COLUMNS:
        assert f"| {column.name} |" in script.PAGE.read_text()
        keys = [a.removeprefix("--config.") for a in column.arguments(False) if a.startswith("--config.")]
        side = measured.Side(
            "A", benchmark.other_config(config.defaults(), keys), read_lengths(column.lengths), steps=2
        )
        assert side.left_out == 0 and side.plan.fill > 0.97


def test_a_flag_is_added_to_those_that_are_set(monkeypatch):
    script = accelerator()
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    assert script.environment("--b=2", {})["XLA_FLAGS"] == "--a=1 --b=2"
    assert script.environment("level", {"C": "3"}).items() >= {"XLA_FLAGS": "--a=1", "C": "3"}.items()


def command_of(code):
    return [sys.executable, "-c", f"import pathlib, sys, time; out = pathlib.Path(sys.argv[-1][7:]); {code}"]


def test_a_session_stops_what_has_no_time_and_keeps_what_there_is(tmp_path, monkeypatch):
    accelerator()
    import sessions

    session, slow = sessions.Session(tmp_path, 9), command_of("out.write_text('[2'); time.sleep(60)")
    assert session.measure("a b", command_of("out.write_text('[1]')"), os.environ) == [1]
    assert session.measure("broken", command_of("raise ValueError('no')"), os.environ) is None
    assert session.failures == {"broken": "ValueError: no"} and not session.late
    for least, failures, late in ((0.1, {"slow": "stopped after 1 s"}, []), (2.5, {}, ["slow"])):
        monkeypatch.setattr(sessions, "LEAST_SECONDS", least)
        session = sessions.Session(tmp_path, 9, 3.0)
        assert session.measure("slow", slow, os.environ) is None and not (tmp_path / "slow.json").exists()
        assert (session.failures, session.late) == (failures, late)
    session = sessions.Session(tmp_path, 9, 0.0)
    assert session.measure("new", slow, os.environ) is None and session.late == ["new"]
    assert session.measure("broken", slow, os.environ) is None and session.failures == {"broken": "ValueError: no"}
    assert session.measure("a b", slow, os.environ) == [1]  # from its file


def test_an_archive_has_the_figures_and_the_end_of_each_log(tmp_path):
    accelerator()
    import sessions

    for name, text in {"a.json": "{}", "b.failed": "no", "RESULTS.md": "page", "a.log": "x" * 10**6}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "other").mkdir()
    with tarfile.open(sessions.write_archive(tmp_path, tmp_path / "RESULTS.md")) as archive:
        sizes = {entry.name: entry.size for entry in archive}
    assert sizes == {"RESULTS.md": 4, "a.json": 2, "a.log": sessions.LOG_BYTES, "b.failed": 2}


def test_the_accelerators_measurements_come_in_the_order_of_their_worth(tmp_path):
    script = accelerator()
    tables = [one.table for one in script.planned(tmp_path, False, 30, [], 1, 4800.0)]
    assert tables == ["columns"] * 5 + ["kernel"] + ["sampler"] * 2 + ["flags"] * 12


def test_figures_that_were_carried_home_make_the_page(tmp_path):
    script = accelerator()
    (tmp_path / "command.txt").write_text("python there")
    rows = [{"work": "40x8x4", "tokens_per_s": 1234.0, "step": 0.005, "share": 0.5}]
    (tmp_path / "sampler_tiny.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "kernel.failed").write_text("no kernel")
    failures = script.run(asked(script, tmp_path, "--smoke", "--page"))
    page = (tmp_path / "RESULTS.md").read_text()
    assert failures == {"kernel": "no kernel"} and "- `kernel` failed: no kernel" in page
    assert "| tiny | 40 x 8 x 4 | 1,234 | 5.0 | 50% |" in page
    assert (tmp_path / "command.txt").read_text() == "python there"


def test_sigterm_ends_what_runs_and_leaves_page_and_archive(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "accelerator.py"), f"--workdir={tmp_path}", "--smoke"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert "[1/" in running.stdout.readline()
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 128 + signal.SIGTERM
    assert "0.5B hh" in (tmp_path / "RESULTS.md").read_text() and (tmp_path / "results.tar.gz").exists()


@pytest.mark.release  # eleven processes; the command itself is in the test above
def test_smoke_fills_the_page(tmp_path):
    script = accelerator()
    before = script.PAGE.read_text()
    command = [sys.executable, str(ROOT / "benchmarks" / "accelerator.py"), f"--workdir={tmp_path}"]
    done = subprocess.run([*command, "--smoke", "--steps=2"], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert script.PAGE.read_text() == before
    part = (tmp_path / "RESULTS.md").read_text().partition(script.BEGIN)[2].partition(script.END)[0]
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in part.splitlines() if line.startswith("|")}
    assert len(rows["**pairs/s**"]) == 5
    assert all(float(cell.strip(" *").replace(",", "")) > 0 for cell in rows["**pairs/s**"])
    assert all(float(cell) > 0 for name in ("hh", "long") for cell in rows[name])
    assert "1 x cpu" in part and "as it is, again" in part and "failed" not in part
    counts = collections.Counter(path.suffix for path in tmp_path.iterdir())
    assert counts[".json"] == 9
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert {"RESULTS.md", "0.5B_hh.json", "sampler_tiny.json", "kernel.log"} <= set(archive.getnames())
    assert (tmp_path / "results.tar.gz").stat().st_size < 300_000

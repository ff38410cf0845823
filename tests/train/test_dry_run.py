"""What a dry run says of hardware that is not here: collectives read from compiled programs, and times from figures."""

import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rmjax.batches.packing import make_plan
from rmjax.batches.random_groups import RandomGroups
from rmjax.data import synthetic
from rmjax.hardware import flops, topology
from rmjax.hardware.collectives import Collective, array_bytes, collectives
from rmjax.models import config as model_config
from rmjax.models import heads
from rmjax.runtime import config_file
from rmjax.train import dry_run

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, XLA's compiler for TPUs, is not installed"
)


def run(code, **environment):
    """Runs code on 8 fake devices and returns what it prints."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -------------------------------------------------------------------------------- collectives

KNOWN = """if True:
    import jax, jax.numpy as jnp
    from jax.sharding import PartitionSpec as P
    from rmjax.hardware.collectives import collectives

    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def gather_in_a_loop(x):  # 5 times: 16 numbers of 4 devices become 64
        body = lambda c, _: (jax.lax.all_gather(x * c, "b", tiled=True).sum(), None)
        return jax.lax.scan(body, jnp.float32(1), None, length=5)[0][None]

    def reduce(x):
        return jax.lax.psum(x, "a")

    def reduce_in_nested_loops(x):  # 3 x 7 times
        inner = lambda c, _: (jax.lax.psum(c * x, ("a", "b")), None)
        outer = lambda c, _: (jax.lax.scan(inner, c, None, length=7)[0], None)
        return jax.lax.scan(outer, x, None, length=3)[0]

    def scatter(x):
        return jax.lax.psum_scatter(x, "b", tiled=True)

    def exchange(x):
        return jax.lax.all_to_all(x.reshape(4, -1), "b", 0, 0).reshape(-1)

    def shift(x):
        return jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)])

    def unknown_loop(x):  # until a condition of the numbers holds
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: jax.lax.psum(c, "b"), x)

    def local(x):
        return x + 1

    for function in (gather_in_a_loop, reduce, reduce_in_nested_loops, scatter, exchange, shift, unknown_loop, local):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)
        text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((128,), jnp.float32)).compile().as_text()
        found, unknown = collectives(text, 8)
        print(function.__name__, unknown, *[(x.kind, x.times, x.sent, x.group) for x in found], sep="|")
"""


def test_known_collectives_are_found():
    """Of 16 float32 on each of 2 x 4 devices; `b` are neighbours, `a` is 4 apart."""
    lines = dict(line.split("|", 1) for line in run(KNOWN).splitlines())
    near = (0, 1, 2, 3)
    assert lines["gather_in_a_loop"] == f"0|('all-gather', 5, {64 * 4 * 3 / 4}, {near})"
    assert lines["reduce"] == f"0|('all-reduce', 1, {2 * 16 * 4 / 2}, (0, 4))"
    assert lines["reduce_in_nested_loops"] == f"0|('all-reduce', 21, {2 * 64 * 7 / 8}, {tuple(range(8))})"
    assert lines["scatter"] == f"0|('reduce-scatter', 1, {4 * 4 * 3}, {near})"
    assert lines["exchange"] == f"0|('all-to-all', 1, {64 * 3 / 4}, {near})"
    assert lines["shift"] == "0|('collective-permute', 1, 64, (0, 1))"
    assert lines["unknown_loop"] == f"1|('all-reduce', 1, {2 * 64 * 3 / 4}, {near})"
    assert lines["local"] == "0"


# As compilers for GPUs and TPUs write them: in two halves, in fusions, in several fusions at once, and in loops whose
# turns stand in their condition only.
FORMS = """
%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %all-reduce.1 = f32[64]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[8]{0} dynamic-slice(%all-reduce.1, %start)
}

%async_part (q: bf16[8]) -> bf16[64] {
  ROOT %all-gather.7 = bf16[64]{0:T(256)S(1)} all-gather(%q), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%async_part.1 (q: bf16[8]) -> bf16[64] {
  ROOT %all-gather.8 = bf16[64]{0:T(256)S(1)} all-gather(%q), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%body (arg: (u32[], f32[4])) -> (u32[], f32[4]) {
  %arg = (u32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[4]{0} get-tuple-element(%arg), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %collective-permute-start = (f32[4]{0}, f32[4]{0}, u32[], u32[]) PERMUTE
  %collective-permute-done = f32[4]{0} collective-permute-done(%collective-permute-start)
  ROOT %tuple.2 = (u32[]{:T(128)}, f32[4]{0}) tuple(%next, %collective-permute-done)
}

%condition (arg: (u32[], f32[4])) -> pred[] {
  %arg.1 = (u32[]{:T(128)}, f32[4]{0}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %nine = u32[]{:T(128)} constant(9)
  ROOT %less = pred[]{:T(512)} compare(%j, %nine), direction=LT
}

ENTRY %main (x: f32[64], y: bf16[8]) -> f32[8] {
  %x.1 = f32[64]{0} parameter(0)
  %y = bf16[8]{0} parameter(1)
  %fusion.1 = f32[8]{0} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.2 = bf16[64]{0} fusion(%y), kind=kLoop, calls=%async_part
  %fusion.3 = bf16[64]{0} fusion(%y), kind=kLoop, calls=%async_part.1
  %all-gather-start = ((f32[2]{0}, f32[1]{0}), (f32[4]{0}, f32[2]{0})) GATHER
  %all-gather-done = (f32[4]{0}, f32[2]{0}) all-gather-done(%all-gather-start)
  %zero = u32[]{:T(128)} constant(0)
  %copy = u32[]{:T(128)} copy(%zero)
  %start.1 = (u32[]{:T(128)}, f32[4]{0}) tuple(%copy, %x.1)
  %while = (u32[]{:T(128)}, f32[4]{0}) while(%start.1), condition=%condition, body=%body
  %all-to-all-start = ((f32[16]{0}), f32[16]{0}) async-start(%x.1), calls=%wrapped
  ROOT %done = f32[8]{0} bitcast(%fusion.1)
}

%wrapped (w: f32[16]) -> f32[16] {
  ROOT %all-to-all.1 = f32[16]{0} all-to-all(%w), channel_id=4, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}
"""
FORMS = FORMS.replace(
    "PERMUTE", "collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}"
).replace("GATHER", "all-gather-start(%a, %b), channel_id=9, replica_groups=mesh['x'=4,'y'=2] {'y'}, dimensions={0}")


def test_forms_of_other_compilers():
    found, unknown = collectives(FORMS, 8)
    assert unknown == 0
    every = tuple(range(8))
    assert collections.Counter(found) == collections.Counter(
        [
            Collective("reduce-scatter", 1, 64 * 4 * 7 / 8, every),
            Collective("all-gather", 1, 64 * 2 * 7 / 8, every),  # once, though in two fusions
            Collective("all-gather", 1, 6 * 4 / 2, (0, 1)),
            Collective("collective-permute", 5, 16, (0, 1)),  # 0, 2, 4, 6, 8
            Collective("all-to-all", 1, 16 * 4 * 3 / 4, (0, 2, 4, 6)),
        ]
    )


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{0,3},{1,2}}", (0, 3)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_groups_in_every_form(groups, first):
    text = (
        f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  ROOT %r = f32[8]{{0}} all-reduce(%x), {groups}, to_apply=%add\n}}\n"
    )
    ((found,), _) = collectives(text, 8)
    assert found.group == first


def test_bytes_of_shapes():
    assert array_bytes("f32[2,3]{1,0:T(8,128)}") == 24
    assert array_bytes("(bf16[8]{0}, /*index=5*/s32[]{:T(128)}, pred[4])") == 24
    assert array_bytes("f8e4m3fn[16]") == 16 and array_bytes("(c64[2], u8[3], token[])") == 19


# -------------------------------------------------------------------------------- times


class Device:
    """What a described device says of its place."""

    def __init__(self, host=0, coords=(0, 0, 0)):
        self.process_index, self.coords = host, coords


def test_links_of_gpus():
    hosts = lambda *counts: [Device(host) for host, count in enumerate(counts) for _ in range(count)]
    assert topology.link("h100:8", hosts(8)) == 450e9
    assert topology.link("h100:16", hosts(8, 8)) == 400e9  # eight adapters of a host together
    assert topology.link("h100:16", hosts(1, 1)) == 50e9
    assert topology.link("a100:16", hosts(8, 8)) == 200e9


def test_links_of_tpus():
    line, plane = (
        [Device(coords=(x, 0, 0)) for x in range(4)],
        [Device(coords=(x, y, 0)) for x in (0, 1) for y in (0, 1)],
    )
    assert topology.link("v5e:2x2", line) == 100e9 and topology.link("v5e:2x2", plane) == 200e9
    assert topology.link("v5p:2x2x1", line) == pytest.approx(200e9)


def test_arithmetic_of_the_times():
    """500 TFLOP at 1,000 TFLOP/s; 2 x 3 + 4 x 2 x (1 + 2) = 30 GB at 3,000 GB/s; 0.1 s of sending."""
    traffic = dry_run.Traffic(state=3 * 10**9, weights=10**9, kept=2 * 10**9, micro=4)
    work = dry_run.Work(5e14, 1e15, traffic, 3e12, 0.1)
    assert traffic.bytes == 30 * 10**9
    assert work.seconds == pytest.approx((0.5, 0.01, 0.1))
    lines = dry_run.time_lines(work, 7200)
    assert re.search(r"compute +500 ms +5e\+14 FLOPs / 1,000 TFLOP/s", lines[1])
    assert re.search(
        r"step +500 ms +if all three overlap, 610 ms if nothing does; 7,200 steps: 1 to 1.22 hours", lines[-1]
    )


def test_flops_of_a_step_are_those_of_its_groups():
    """Against `flops.hardware` by the lengths alone, as benchmark.py counts."""
    values = {"model_type": "mistral", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}
    values |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 7}
    model = model_config.from_hf(values)
    _, params = heads.abstract(model, 1)
    groups = RandomGroups(np.random.default_rng(0).integers(2, 20, (60, 3)), 96)
    plan = make_plan(groups.lengths, groups.ends, row_tokens=64, rows_per_step=8)
    every = flops.hardware(model, params, groups.lengths, groups.ends, groups.visible_pairs)
    steps = min(dry_run.STEPS, plan.steps)
    expected = sum(every[row].sum() for step in range(steps) for row in plan.rows(step)) / steps
    chosen = [groups.group(int(i)) for step in range(steps) for row in plan.rows(step) for i in row]
    said = SimpleNamespace(config=model, plain=SimpleNamespace(shapes=params), flops_each=flops.TRAINED)
    assert dry_run.step_flops(said, chosen, steps) == pytest.approx(expected)


def test_a_language_model_counts_its_output_embedding_where_it_learns():
    values = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}
    values |= {"num_hidden_layers": 3, "num_attention_heads": 4, "tie_word_embeddings": True}
    _, params = heads.abstract(model_config.from_hf(values), 0, architecture="CausalLM")
    layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert flops.parameters(params) == (3 * layer, 96 * 32)


# -------------------------------------------------------------------------------- the command


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "rmjax.main", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done


@needs_libtpu
@pytest.mark.slow
def test_the_command(tmp_path):
    """No TPU is here, and of the model only its config.json and tokenizer."""
    values = {**config_of("bt_tiny").model.scratch.to_dict(), "vocab_size": 1024}
    synthetic.make_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    done = command(
        "--config=configs/bt_tiny.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.cache_dir={tmp_path}",
        f"--config.model.init_from={tmp_path / 'model'}",
        "--config.model.tokenizer=",
        "--dry_run",
        "--topology=v5e:2x4",
        "--config.mesh.tensor=2",
    )
    assert done.returncode == 0, done.stderr
    assert "mesh: data 1 x fsdp 4 x tensor 2 on 8 devices" in done.stdout
    for part in ("compiled for v5e:2x4, TPU v5 lite", "parameters", "optimizer state", "temporaries", "headroom"):
        assert part in done.stdout
    assert re.search(r"all-gather over 4 +\d+ +\d", done.stdout) and re.search(r"all-reduce over 2 +\d+", done.stdout)
    assert re.search(r"step +[\d.]+ us +if all three overlap", done.stdout)
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_said(tmp_path):
    config = ["--config=configs/bt_qwen7b.py", f"--workdir={tmp_path}"]
    done = command(*config, "--topology=v5e:2x4")
    assert done.returncode == 2 and "add --dry_run" in done.stderr


@needs_libtpu
def test_what_is_enough_is_said():
    config = config_of("bt_qwen7b")
    config.data.train = "/nowhere/pairs.jsonl"
    with pytest.raises(
        ValueError, match=r"/nowhere/pairs.jsonl.* a few rows of the same form .*--config.data.train=FILE"
    ):
        dry_run.target(config, "v5e:2x4")
    config.data.train, config.model.init_from = "synthetic://pairs?n=10", "/nowhere/model"
    with pytest.raises(
        ValueError, match=r"/nowhere/model: no such directory.* a directory with the model's config.json"
    ):
        dry_run.target(config, "v5e:2x4")


def test_nothing_changes_without_a_topology():
    config = config_of("bt_tiny")
    assert dry_run.target(config, "") == (config, None, 0)


def config_of(name):
    return config_file.load(str(ROOT / "configs" / f"{name}.py"))

r"""TRL's RewardTrainer against rmjax on a CPU: the same model, pairs, optimizer and cores, in alternating rounds.

    python -m venv trl && trl/bin/pip install 'torch==2.13.0' 'trl==1.16.*'
    python benchmarks/trl_cpu.py --trl-python=trl/bin/python

(On Linux `--extra-index-url=https://download.pytorch.org/whl/cpu` spares TRL's environment the CUDA libraries.)

The model is a Qwen2 reward model of 4 layers with random weights, made by transformers; the pairs are random tokens
of the `hh` lengths. With --responses=4 or 7 they are all pairs of rankings, whose lengths are drawn (`RANKINGS`):
rmjax trains on each ranking as one tree, TRL on its pairs. Both sides train in float32 without recomputation, with
the same AdamW. First each trains three steps on the first pairs: if the losses are not equal to 1e-4 it ends there.
Then come the rounds, each an epoch of TRL in its own process and one of rmjax in its own, one at a time. Every pair
of an epoch is trained on once, but for the last step of TRL, which it drops where it is not full.

With --objective=pairwise a judge reads both responses in one context, in both orders: for rmjax one tree, for
transformers' own Trainer (TRL has no such trainer) two rows, with the cross-entropy of A and B.

TRL groups by length. Its steps are 32 pairs (of rankings 48 of 4 responses, 84 of 7), by default in micro-batches of
4: they are padded less, and on a CPU that was faster than one batch of 32. Our steps are rows of --row-tokens tokens,
as many as hold TRL's pairs on average.
A rate is the pairs of all steps but the first over their time, data loading included, starting and compiling not. With
--steps=N a round takes the first N steps of TRL and as many of ours. Take a multiple of 18: TRL sorts 18 steps at a
time by length, so fewer are not like the rest.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

START = time.perf_counter()
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 6400,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "num_labels": 1,
    "pad_token_id": 6399,  # in no pair
    "bos_token_id": None,
    "eos_token_id": None,
}
OPTIM = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0}
PAIRS_PER_STEP = {2: 32, 4: 48, 7: 84}  # by responses of a group: whole rankings
# Mean tokens of prompt and response of rankings of so many responses: estimates of what UltraFeedback (4) and Nectar
# (7) hold, not counted there. Lengths are log-normal around them.
RANKINGS = {4: (185, 305), 7: (160, 190)}
CHECK_STEPS, TOLERANCE = 3, 1e-4


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="the Python of an environment that has TRL")
    parser.add_argument("--lengths", default="hh", help="a file of lengths (data/random_groups.py)")
    parser.add_argument("--objective", default="bradley_terry", choices=("bradley_terry", "pairwise"))
    parser.add_argument("--responses", type=int, default=2, choices=(2, *RANKINGS), help="of a group; see above")
    parser.add_argument("--pairs", type=int, default=0, help="the first pairs of the file; 0 is all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="steps of a round; 0 is an epoch")
    parser.add_argument("--cores", type=int, default=0, help="cores of both sides; 0 is all there are")
    parser.add_argument("--row-tokens", type=int, default=1280, help="ours: length of a row; longer where a tree is")
    parser.add_argument("--micro-rows", type=int, default=2, help="ours: rows of a micro-batch; 0 is all of a step")
    parser.add_argument("--host-devices", type=int, default=1, help="ours: devices that JAX makes of the CPU")
    parser.add_argument("--trl-micro", type=int, default=4, help="TRL's: pairs of a micro-batch")
    parser.add_argument("--trl-attention", default="sdpa", help="TRL's: attention implementation")
    parser.add_argument("--trl-optimizer", default="adamw_torch_fused", help="TRL's: `optim` of its config")
    parser.add_argument("--trl-compile", action="store_true", help="TRL's: torch.compile")
    parser.add_argument("--side", choices=("both", "trl", "ours"), default="both", help="the other is left out")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.objective == "pairwise" and given.responses != 2:
        parser.error("--objective=pairwise judges two responses")
    if given.side != "ours" and not given.trl_python and not given.job:
        parser.error("--trl-python is missing: the Python of an environment that has TRL")
    return given


# ----------------------------------------------------------------------------------------------------
# Ours, in a process of its own
# ----------------------------------------------------------------------------------------------------


def groups_of(job: dict[str, Any]) -> Any:
    """The groups, or with `pairwise` the same pairs as a judge reads them."""
    import numpy as np

    from rmjax.batches.groups import Group
    from rmjax.batches.random_groups import RandomGroups
    from rmjax.batches.trees import build_tree
    from rmjax.objectives.pairwise import Pairwise

    class InBothOrders(RandomGroups):
        fields = Pairwise(classes=2).task.fields

        def __init__(self, sizes: np.ndarray, vocabulary: int):
            super().__init__(sizes, vocabulary)
            self.lengths = sizes[:, 0] + 2 * sizes[:, 1:].sum(1) + 1

        def group(self, index: int) -> Group:
            shared = int(self.sizes[index, 0])
            first, second = super().group(index).tree.sequences()
            orders = [np.concatenate([first, second[shared:]]), np.concatenate([second, first[shared:]])]
            labels = {"verdict": np.eye(2, dtype=np.float32), "strength": np.full(1, np.nan, np.float32)}
            return Group(build_tree(orders), labels, 1.0, self.id(index))

    kind = InBothOrders if job["objective"] == "pairwise" else RandomGroups
    return kind(np.array(job["sizes"])[: job["first"] or None], job["vocabulary"])


def split_of(job: dict[str, Any]) -> Any:
    """Our pairs, their plan and the shape of its batches: the first pairs in one step an epoch, or all as in a run."""
    from rmjax.batches import loader, packing
    from rmjax.batches.prepare import Split

    groups = groups_of(job)
    options = {"row_tokens": job["ours"]["row_tokens"], "epochs": job["epochs"]}
    pack = lambda rows, seed: packing.make_plan(groups.lengths, groups.ends, rows_per_step=rows, seed=seed, **options)
    rows = len(pack(1, job["seed"]).row_start) - 1  # of all epochs
    wanted = -(-job["groups_per_step"] * rows // (len(groups) * job["epochs"]))
    devices = job["ours"]["host_devices"]
    of_devices = lambda rows: -(-rows // devices) * devices
    plan = pack(of_devices(rows), None) if job["first"] else pack(of_devices(wanted), job["seed"])
    plan = plan.first(min(job["steps"] or plan.steps, plan.steps))
    micro_rows = max(1, (job["ours"]["micro_rows"] or plan.rows_per_step) // devices)
    shape = loader.plan_shape(
        plan, int(groups.ends[0]), micro_rows=micro_rows, row_devices=devices, labels=groups.fields
    )
    return Split(groups, plan, shape)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Trains on the pairs of `split_of` with the pieces of a run; times every step.

    Args:
        job: see `job_of`.

    Returns:
        start_s, seconds until the first step begins; compile_s of it; and for each step its seconds, pairs, tokens
        (padding too) and loss.
    """
    import jax
    import numpy as np

    from rmjax import config as config_lib
    from rmjax import objectives, sharding
    from rmjax.batches import loader
    from rmjax.hardware import memory
    from rmjax.inference.parameters import abstract_model
    from rmjax.models import hf
    from rmjax.train import optim
    from rmjax.train.step import build_program

    config, split = config_lib.defaults(job["objective"]), split_of(job)
    if job["objective"] == "pairwise":
        config.objective.classes = 2
    plan, shape = split.plan, split.shape
    # No matrix product is recomputed, on either side.
    config.model.remat, config.optim.schedule, config.optim.warmup = memory.POLICIES[0], "constant", "0 steps"
    config.optim.update(job["optim"])
    devices = job["ours"]["host_devices"]
    mesh = sharding.make_mesh({"data": devices, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])
    model = abstract_model(config, objectives.make(config.objective), mesh, hf.read_config(job["model"]))
    with jax.set_mesh(mesh):
        program = build_program(config, model, plan)
        begin = time.perf_counter()
        step = program.lower(shape, mesh).compile()
        compile_s = time.perf_counter() - begin
        params, _ = hf.load(job["model"], program.state["params"], model.config, seed=0, require_head=True)
        opt = jax.jit(optim.make(config.optim, config.seed).init, out_shardings=program.shardings["opt"])(params)
        state, one = {"params": params, "opt": opt}, sharding.named(mesh)
        batches = loader.batches(split.groups, plan, shape, sharding.named(mesh, sharding.BATCH))
        halted, batch = jax.device_put(False, one), next(batches)
        clock, losses = [time.perf_counter()], []
        for number in range(plan.steps):
            state, sums, halted = step(state, batch, jax.device_put(np.int32(number), one), halted)
            batch = next(batches, None)
            loss, weight = jax.device_get(sums["loss"]).astype(float)
            losses.append(float(loss / weight))
            clock.append(time.perf_counter())
    return {
        "start_s": clock[0] - START,
        "compile_s": compile_s,
        "seconds": [b - a for a, b in itertools.pairwise(clock)],
        "pairs": [job["pairs_of_group"] * sum(map(len, plan.rows(number))) for number in range(plan.steps)],
        "tokens": [shape.micro * shape.rows * shape.tokens] * plan.steps,
        "losses": losses,
        "versions": {name: importlib.metadata.version(name) for name in ("rmjax", "jax", "jaxlib")},
    }


# ----------------------------------------------------------------------------------------------------
# The comparison
# ----------------------------------------------------------------------------------------------------


def rate(result: dict[str, Any], what: str = "pairs") -> float:
    """Pairs (or tokens) a second over all steps but the first."""
    return sum(result[what][1:]) / sum(result["seconds"][1:])


def check(trl: dict[str, Any], ours: dict[str, Any], pairs: int) -> str:
    """Says that both sides compute the same losses.

    Raises:
        ValueError: the losses of a step are not equal to TOLERANCE, or they were not of all the steps.
    """
    both = list(zip(trl["losses"], ours["losses"]))
    if len(both) != CHECK_STEPS or len(trl["losses"]) != len(ours["losses"]):
        raise ValueError(
            f"TRL did {len(trl['losses'])} steps on the first pairs and we {len(ours['losses'])}, "
            f"expected {CHECK_STEPS}: nothing can be compared"
        )
    apart = [abs(a - b) for a, b in both]
    shown = ", ".join(f"{a:.6f} and {b:.6f}" for a, b in both)
    if not all(x <= TOLERANCE for x in apart):  # NaN is not
        raise ValueError(
            f"the losses of the first {CHECK_STEPS} steps differ by more than {TOLERANCE:g} "
            f"(TRL and ours: {shown}): the two sides do not train the same"
        )
    return f"losses of the first steps on the same {pairs} pairs, TRL and ours: {shown}"


def refuse_smaller_steps(result: dict[str, Any], expected: int) -> None:
    """Makes sure that a round's steps had enough real pairs: a smaller step has less to learn from.

    Raises:
        ValueError: fewer than `expected` on average over the steps that are full.
    """
    full = result["pairs"][:-1] or result["pairs"]
    if statistics.mean(full) < expected:
        raise ValueError(
            f"a step had {statistics.mean(full):.1f} pairs on average, expected {expected} at least; "
            "choose another --row-tokens"
        )


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Rates of all rounds, their medians, and how many times TRL's pairs a second ours are, round by round."""
    rates = {side: [rate(r[side]) for r in rounds] for side in ("trl", "ours")}
    ratios = [b / a for a, b in zip(rates["trl"], rates["ours"])]
    return {
        **{f"{side}_pairs_per_s": values for side, values in rates.items()},
        **{f"{side}_median": statistics.median(values) for side, values in rates.items()},
        "ratios": ratios,
        "ratio_median": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
    }


def table(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """What `summary` holds, for a terminal."""
    values = summary(rounds)
    rows = zip(values["trl_pairs_per_s"], values["ours_pairs_per_s"], values["ratios"])
    lines = [f"{'round':>6}  {'TRL pairs/s':>12}  {'ours pairs/s':>12}  {'times':>6}"]
    lines += [f"{n:>6}  {a:12.2f}  {b:12.2f}  {ratio:6.2f}" for n, (a, b, ratio) in enumerate(rows, 1)]
    lines.append(
        f"{'median':>6}  {values['trl_median']:12.2f}  {values['ours_median']:12.2f}  {values['ratio_median']:6.2f}"
        f"  (from {values['ratio_least']:.2f} to {values['ratio_most']:.2f})"
    )
    return "\n".join(lines)


def describe(side: str, result: dict[str, Any]) -> str:
    """One side's round in one line."""
    compiling = f", of these {result['compile_s']:.1f} s compiling" if "compile_s" in result else ""
    return (
        f"  {side}: {rate(result):.2f} pairs/s, {rate(result, 'tokens'):,.0f} tokens/s with padding; "
        f"{len(result['pairs'])} steps of {statistics.mean(result['pairs']):.1f} pairs; "
        f"first step {result['seconds'][0]:.2f} s after {result['start_s']:.1f} s{compiling}"
    )


def sizes_of(given: argparse.Namespace) -> "np.ndarray":
    """Tokens of the prompt and of each response of every group, int64 [n, 1 + K]; drawn where they are rankings."""
    import numpy as np

    from rmjax.batches.random_groups import read_lengths

    if given.responses == 2:
        return read_lengths(given.lengths)[: given.pairs or None]
    prompt, response = RANKINGS[given.responses]
    count = (given.pairs or 9000) // math.comb(given.responses, 2)
    means = np.array([prompt] + [response] * given.responses)
    spread = 0.6  # of the logarithms: the longest of a hundred is about four times the median
    drawn = np.random.default_rng(0).lognormal(np.log(means) - spread**2 / 2, spread, (count, len(means)))
    return np.clip(drawn.round(), 8, 1000).astype(np.int64)


def fit_rows(given: argparse.Namespace, longest: int) -> None:
    """Makes rows as long as the longest tree, and says so."""
    if longest > given.row_tokens:
        rows = -(-longest // 256) * 256
        print(f"a tree has {longest:,} tokens: rows of {rows:,} instead of {given.row_tokens:,}", flush=True)
        given.row_tokens = rows


def job_of(given: argparse.Namespace, scratch: Path, sizes: list[list[int]]) -> dict[str, Any]:
    """What both sides are told; `first` groups in their order, or 0: all, as each side orders them."""
    pairs_of_group = math.comb(len(sizes[0]) - 1, 2)
    return {
        "do": "train",
        "objective": given.objective,
        "model": str(scratch / "model"),
        "shape": SHAPE | {"num_labels": 2 if given.objective == "pairwise" else 1},
        "pairs": str(scratch / "pairs.json"),
        "scratch": str(scratch / "trl"),
        "sizes": sizes,
        "vocabulary": SHAPE["pad_token_id"],
        "first": 0,
        "epochs": 1,
        "steps": given.steps,
        "seed": 0,
        "pairs_of_group": pairs_of_group,
        "groups_per_step": PAIRS_PER_STEP[len(sizes[0]) - 1] // pairs_of_group,
        "optim": OPTIM,
        "ours": {
            "row_tokens": given.row_tokens,
            "micro_rows": given.micro_rows,
            "host_devices": given.host_devices,
        },
        "trl": {
            "micro": given.trl_micro,
            "attention": given.trl_attention,
            "optimizer": given.trl_optimizer,
            "compile": given.trl_compile,
        },
    }


def write_pairs(path: Path, sizes: list[list[int]], vocabulary: int) -> None:
    """The pairs of the groups that our side makes for itself, as [prompt, chosen, rejected] in token ids."""
    import numpy as np

    from rmjax.batches.random_groups import RandomGroups

    groups = RandomGroups(np.array(sizes), vocabulary)
    pairs = []
    for index, (prompt, *_) in enumerate(sizes):
        ranked = [x.tolist() for x in groups.group(index).tree.sequences()]
        pairs += [[a[:prompt], a[prompt:], b[prompt:]] for a, b in itertools.combinations(ranked, 2)]
    path.write_text(json.dumps(pairs))


def run(command: list[str], job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Does a job in a process of its own; its last line is the answer."""
    path = scratch / "job.json"
    path.write_text(json.dumps(job))
    threads = str(len(os.sched_getaffinity(0)))
    env = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    devices = job.get("ours", {}).get("host_devices", 1)
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run([*command, str(path)], stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with status {done.returncode}; what it said is above")
    return json.loads(done.stdout.splitlines()[-1])


def compare(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Makes model and pairs, checks that both sides train the same, and measures; prints as it goes."""
    sizes = sizes_of(given)
    job = job_of(given, scratch, sizes.tolist())
    fit_rows(given, int(groups_of(job).lengths.max()))
    job["ours"]["row_tokens"] = given.row_tokens
    write_pairs(scratch / "pairs.json", sizes.tolist(), job["vocabulary"])
    commands = {
        "trl": [given.trl_python, str(Path(__file__).with_name("trl_side.py"))],
        "ours": [sys.executable, __file__, "--job"],
    }
    made = run(commands["trl"], {**job, "do": "make"}, scratch)
    cores = len(os.sched_getaffinity(0))
    pairs_per_step = job["groups_per_step"] * job["pairs_of_group"]
    pairs = len(sizes) * job["pairs_of_group"]
    print(f"{made['parameters']:,} parameters, {pairs:,} pairs of {len(sizes):,} groups, {cores} cores", flush=True)
    first = {**job, "first": job["groups_per_step"], "epochs": CHECK_STEPS, "steps": 0}
    checked = {side: run(command, first, scratch) for side, command in commands.items()}
    versions = {**checked["trl"]["versions"], **checked["ours"]["versions"]}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(check(checked["trl"], checked["ours"], pairs_per_step), flush=True)
    rounds = []
    for number in range(given.rounds):
        print(f"round {number + 1}", flush=True)
        rounds.append({})
        for side, command in commands.items():
            if given.side in ("both", side):
                rounds[-1][side] = result = run(command, {**job, "seed": number}, scratch)
                refuse_smaller_steps(result, pairs_per_step)
                print(describe(side, result), flush=True)
    figures = {"cores": cores, "versions": versions, "options": {k: str(v) for k, v in vars(given).items()}}
    if given.side == "both":
        print(table(rounds))
        figures |= summary(rounds)
    return {**figures, "check": checked, "rounds": rounds}


def main() -> None:
    """Compares; or, in a process of its own, does our side of a job."""
    given = arguments()
    if given.job:
        print(json.dumps(train(json.loads(given.job.read_text()))))
        return
    if given.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])  # the children inherit it
    try:
        with tempfile.TemporaryDirectory() as scratch:
            figures = compare(given, Path(scratch))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

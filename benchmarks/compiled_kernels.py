"""What NVIDIA's compiler makes of the attention kernels, for a GPU that need not be here.

    JAX_PLATFORMS=cpu python benchmarks/compiled_kernels.py h200:1
    ... --widths=64,128 --prototype=FILE    beside those of a file with `attend(q, k, v, first, until, scale)`

Prints two Markdown tables: a line for each kernel, and one for each of its loops over blocks, with what a visit of a
block costs. Needs rmjax[cuda] and `pip install nvidia-cuda-nvdisasm`; no GPU. XLA writes the kernels as PTX; `ptxas`
makes machine code of it as XLA does, and says what it needs; `nvdisasm` shows it.

Columns, the cycles being estimates by formula for one core (streaming multiprocessor) of Hopper:

    warps       that a core can hold at once, of 64: by registers, shared memory and threads
    ahead       blocks that are being copied while one is used: the copies that a turn of the loop leaves outstanding
                when it begins to compute; 0 means that every copy is waited for in full
    loads       from global memory into registers within the loop, each of which is waited for
    products    cycles of the tensor core: 2,048 multiply-adds each (989 TFLOP/s at 1.83 GHz on 132 cores)
    issue       cycles in which each of a core's four schedulers issues an instruction: in a visit of a whole block,
                and of one that is masked
    special     cycles of the units for exp2, 4 lanes for each scheduler
    KiB         copied from level 2 cache
    FLOP/B      of products for each byte copied
    of peak     of whole blocks, products / the largest of the three: what a core reaches that overlaps everything; and
                products / (products + issue): one that overlaps nothing
"""

import argparse
import dataclasses
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rmjax import sharding
from rmjax.hardware import topology
from rmjax.kernels.tree_attention import block_of, tree_attention
from rmjax.kernels.visible import visible

ROWS, TOKENS, HEADS, KV_HEADS = 4, 8192, 28, 4  # of a micro-batch of Qwen2.5-7B
KERNELS = ("head width", "registers", "spilled, bytes", "shared, KiB", "threads", "warps of 64", "ptxas")
LOOPS = ("head width", "wgmma", "mma", "cp.async", "ahead", "loads", "ldmatrix", "shared", "barriers")
LOOPS += ("products", "issue", "special", "KiB", "FLOP/B", "of peak")
MULTIPLIES = r"\bwgmma\.mma_async|\bmma\.sync"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel as it was compiled.

    Attributes:
        ptx, sass: its code, as lines.
        shared: bytes of shared memory of a block of threads.
    """

    name: str
    ptx: list[str]
    sass: list[str]
    registers: int
    spilled: int
    shared: int
    threads: int
    remarks: str

    def warps(self, gpu: topology.Gpu) -> int:
        """Warps on a core; registers come in units of 8 for each thread, and a block keeps 1 KiB of shared memory."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * self.threads)
        return min(by_registers, gpu.shared // (self.shared + 1024), 2048 // self.threads) * self.threads // 32


def ours(width: int) -> tuple[Callable[..., Any], int]:
    """Output and gradients of the GPU form; and how many arrays of tokens it takes behind q, k, v and dout."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, *spans: jax.Array) -> Any:
        seen = visible(*spans, block=block_of("gpu", TOKENS, width))
        out, pull = jax.vjp(lambda *heads: tree_attention(*heads, seen, form="gpu"), q, k, v)
        return out, *pull(dout)

    return both, 3


def of_file(path: Path, width: int) -> tuple[Callable[..., Any], int]:
    """The same of a file's `attend`."""
    spec = importlib.util.spec_from_file_location("prototype", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, *spans: jax.Array) -> Any:
        out, pull = jax.vjp(lambda *heads: module.attend(*heads, *spans, width**-0.5), q, k, v)
        return out, *pull(dout)

    return both, 2


def compiled(function: Callable[..., Any], spans: int, width: int, device: str) -> list[Kernel]:
    """The kernels of a function that multiply matrices."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, topology.devices(device)[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    heads = [array(jnp.bfloat16, ROWS, TOKENS, n, width) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).lower(*heads, *[array(jnp.int32, ROWS, TOKENS)] * spans)
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        thunks = next(Path(folder).glob("*thunk_sequence.txt")).read_text()
        found = [_kernel(x, thunks) for x in Path(folder).glob("*.ptx") if re.search(MULTIPLIES, x.read_text())]
    return sorted(found, key=lambda kernel: thunks.index(f" {kernel.name} "))


def _kernel(path: Path, thunks: str) -> Kernel:
    """Assembles the first kernel of a PTX file."""
    ptx, cubin = path.read_text(), path.with_suffix(".cubin")
    target, name = (re.search(pattern, ptx) for pattern in (r"\.target (\w+)", r"\.entry (\w+)\("))
    assert target and name
    said = _run(tool("ptxas"), "-v", f"-arch={target[1]}", str(path), "-o", str(cubin))
    number = lambda pattern, text: int(match[1]) if (match := re.search(pattern, text)) else 0
    launch = next(line for line in thunks.splitlines() if f" {name[1]} " in line)
    remarks = re.findall(r"\((C\d+)\).*?: (.*?) in the function", said)
    return Kernel(
        name[1],
        ptx.splitlines(),
        _run(tool("nvdisasm"), "-c", str(cubin)).splitlines(),
        number(r"Used (\d+) registers", said),
        number(r"(\d+) bytes spill stores", said),
        number(r"shared_memory: (\d+)", launch),
        number(r"threads: \[(\d+)", launch),
        "; ".join(f"{code}: {text}" for code, text in remarks),
    )


@functools.cache
def tool(name: str) -> str:
    """Where a program of NVIDIA's packages, or of CUDA, lies. RuntimeError without it."""
    of_packages = (found for folder in sys.path for found in Path(folder).glob(f"nvidia/cu*/bin/{name}"))
    found = next(map(str, of_packages), None) or shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not here: pip install nvidia-cuda-{'nvcc' if name == 'ptxas' else name}")
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-1000:]}")
    return done.stdout + done.stderr


# -------------------------------------------------------------------------------- loops


def loops(lines: Sequence[str], label: str, branch: str, holds: str) -> Iterator[list[str]]:
    """The innermost loops that hold a line like `holds`: from a label to the branch back to it."""
    places = {match[1]: n for n, line in enumerate(lines) if (match := re.match(label, line))}
    back = [(places[m[1]], n) for n, line in enumerate(lines) if (m := re.search(branch, line)) and m[1] in places]
    spans = [(a, b) for a, b in back if a < b and any(re.search(holds, line) for line in lines[a:b])]
    for a, b in sorted(spans):
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans):
            yield list(lines[a : b + 1])


def loop_rows(kernel: Kernel, width: int) -> list[list[str]]:
    """A line of the table for each loop over blocks."""
    of_ptx = list(loops(kernel.ptx, r"(\$L\w+):", r"bra[. \w]*\s(\$L\w+);", MULTIPLIES))
    of_sass = list(loops(kernel.sass, r"\s*(\.L_\w+):", r"BRA.*`\((\.L_\w+)\)", "HGMMA|HMMA"))
    if len(of_ptx) != len(of_sass):
        raise RuntimeError(f"{kernel.name} has {len(of_ptx)} loops over blocks in PTX and {len(of_sass)} in SASS")
    return [[kernel.name, str(width), *_loop_cells(kernel, *both)] for both in zip(of_ptx, of_sass)]


def _masking(sass: Sequence[str]) -> int:
    """Instructions of a loop that a whole block jumps over: the longest stretch of its kind that compares a lot."""
    places = {match[1]: n for n, line in enumerate(sass) if (match := re.match(r"\s*(\.L_\w+):", line))}
    jumps = [(n, places.get(m[1], 0)) for n, line in enumerate(sass) if (m := re.search(r"BRA.*`\((\.L_\w+)\)", line))]
    spans = [sass[a + 1 : b] for a, b in jumps if b > a]
    return max((sum(";" in x for x in span) for span in spans if sum("ISETP" in x for x in span) > 30), default=0)


def _loop_cells(kernel: Kernel, ptx: Sequence[str], sass: Sequence[str]) -> list[str]:
    """See the module; the columns from `wgmma` on."""
    code = [m[1] for line in sass if (m := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?;)", line))]
    count = lambda pattern, lines: sum(bool(re.search(pattern, line)) for line in lines)
    waits = [int(m[1]) for line in ptx if (m := re.search(r"cp\.async\.wait_group\s+(\d+)", line))]
    groups = count(r"cp\.async\.commit_group", ptx)
    macs = sum(int(m[1]) * int(m[2]) * 16 for line in code if (m := re.search(r"HGMMA\.(\d+)x(\d+)x16", line)))
    macs = macs * kernel.threads // 128 + count("HMMA.16816", code) * 2048 * kernel.threads // 32
    each = kernel.threads // 128  # warps of a scheduler
    products, special = macs / 2048, count(r"MUFU", code) * 8 * each
    issue, masked = (len(code) - _masking(sass)) * each, len(code) * each
    copied = sum(16 if ".128" in x else 8 if ".64 " in x else 4 for x in code if "LDGSTS" in x) * kernel.threads
    cells: list[Any] = [count("HGMMA", code), count("HMMA", code), count("LDGSTS", code)]
    cells += [min(waits, default=0) // max(groups, 1), count(r"\bLDG\.", code), count("LDSM", code)]
    cells += [
        count(r"\b(LDS|STS|STSM)\b", code),
        count(r"BAR\.SYNC", code),
        round(products),
        f"{issue}, {masked}",
        special,
    ]
    share = products / max(products, issue, special), products / (products + issue)
    intensity = f"{2 * macs / copied:.0f}" if copied else ""
    return [*map(str, cells), f"{copied / 1024:.1f}", intensity, f"{share[0]:.0%}, {share[1]:.0%}"]


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hardware", help="a GPU of rmjax/hardware/topology.py, such as h200:1")
    parser.add_argument("--widths", default="64,128,256", help="of heads")
    parser.add_argument("--prototype", type=Path, help="a file with `attend`")
    arguments = parser.parse_args()
    gpu, kernels, turns = topology.GPUS[arguments.hardware.partition(":")[0]], [], []
    for width in map(int, arguments.widths.split(",")):
        programs = [ours(width)] + ([of_file(arguments.prototype, width)] if arguments.prototype else [])
        for program in programs:
            for x in compiled(*program, width, arguments.hardware):
                cells = [width, x.registers, x.spilled, f"{x.shared / 1024:.1f}", x.threads, x.warps(gpu), x.remarks]
                kernels.append([x.name, *map(str, cells)])
                turns += loop_rows(x, width)
    for head, rows in ((KERNELS, kernels), (LOOPS, turns)):
        print("| " + " | ".join(("kernel", *head)) + " |\n|" + "---|" * (len(head) + 1))
        print("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n", flush=True)


if __name__ == "__main__":
    main()

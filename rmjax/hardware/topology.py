"""Descriptions of accelerators that are not here, to compile for on any machine.

XLA compiles for a described device as for a present one; nothing can be run on it. See `jax.experimental.topologies`.
"""

import collections
import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from rmjax.suggestions import install

HOST_GPUS = 8  # of an SXM server


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as XLA must know it: data sheets and CUDA's device properties."""

    name: str
    capability: tuple[int, int]  # CUDA's
    cores: int  # streaming multiprocessors
    float32_units: int  # of each core
    memory: int  # bytes that CUDA reports
    bandwidth: float  # of the memory, bytes per second
    nvlink: float  # bytes per second that it can send to the GPUs of its host, all together
    network: float  # bytes per second to other hosts: one InfiniBand adapter for each GPU
    l2: int  # bytes of the level 2 cache
    shared: int  # bytes of a core's shared memory; a block of threads may have all but 1,024 of them
    clock_ghz: float  # boost clock


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU chip."""

    memory: int  # bytes that programs may use: what XLA says when one needs more
    bandwidth: float  # of the memory, bytes per second
    links: float  # bytes per second that it can send over the links to its neighbours, all together
    axes: int  # of the torus that the links make


# https://www.nvidia.com/en-us/data-center/h200/, .../h100/ and .../a100/ (SXM boards; they give NVLink's two directions
# together); .../l4/ and .../geforce/graphics-cards/40-series/rtx-4090/, which send over PCIe. Memory of the smaller
# ones is what PyTorch's messages say of them (21.95, 23.64 and 39.39 GiB). Adapters:
# https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html (400 Gb/s) and
# .../dgxa100-user-guide/introduction-to-dgxa100.html (200 Gb/s); other servers have others, or none.
GPUS = {
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 150_754_820_096, 4.8e12, 450e9, 50e9, 50 << 20, 228 << 10, 1.98),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 84_942_979_072, 3.35e12, 450e9, 50e9, 50 << 20, 228 << 10, 1.98
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 25_386_352_640, 1.008e12, 32e9, 25e9, 72 << 20, 100 << 10, 2.52
    ),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 128, 23_568_861_594, 0.3e12, 32e9, 25e9, 48 << 20, 100 << 10, 2.04),
    "a100_40gb": Gpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 42_298_834_944, 1.555e12, 300e9, 25e9, 40 << 20, 164 << 10, 1.41
    ),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 85_100_068_864, 2.04e12, 300e9, 25e9, 40 << 20, 164 << 10, 1.41
    ),
}

# https://cloud.google.com/tpu/docs/v5e, .../v5p and .../v6e: memory of 16, 95 and 32 GB; links of 1,600 Gb/s, 1,200
# GB/s in both directions together, and 3,200 Gb/s.
TPUS = {
    "v5e": Tpu(int(15.75 * 2**30), 0.8e12, 200e9, 2),
    "v5p": Tpu(int(95.74 * 2**30), 2.765e12, 600e9, 3),
    "v6e": Tpu(int(31.25 * 2**30), 1.6e12, 400e9, 2),
}

# Without them libtpu waits for an answer that only a TPU's host gives, complains that there is none, and lets in one
# process at a time. Nothing is run here, so many may compile.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(name: str) -> list[jax.Device]:
    """Devices to build a mesh of and compile for.

    "h200:8" is a GPU of `GPUS` and how many of them; more than 8 are hosts of 8. "v5e:2x4" is a TPU of `TPUS` and the
    chips of its slice along each axis; v5p has three. ValueError for another name; RuntimeError without the compiler.
    """
    kind, (family, _, shape) = _kind(name), name.partition(":")
    return _gpus(name, kind, shape) if isinstance(kind, Gpu) else _tpus(name, family, shape)


def memory(name: str) -> int:
    """Bytes that a program may use on each of the devices; `name` and errors as `devices`."""
    return _kind(name).memory


def bandwidth(name: str) -> float:
    """Bytes per second that each of the devices can read or write; `name` and errors as `devices`."""
    return _kind(name).bandwidth


def link(name: str, group: Sequence[Any]) -> float:
    """Bytes per second that a device can send to others of its group, at most; `name` and errors as `devices`.

    GPUs of one host have NVLink; those of several send through the adapters of all in the group on a host. TPUs send
    over the links along the axes of the torus that the group extends over.
    """
    kind = _kind(name)
    if isinstance(kind, Tpu):
        spans = sum(len(set(places)) > 1 for places in zip(*(device.coords for device in group)))
        return kind.links * min(spans, kind.axes) / kind.axes
    on_hosts = collections.Counter(device.process_index for device in group)
    return kind.nvlink if len(on_hosts) == 1 else min(kind.nvlink, kind.network * min(on_hosts.values()))


def _kind(name: str) -> Gpu | Tpu:
    kind = name.partition(":")[0]
    if kind in GPUS or kind in TPUS:
        return GPUS[kind] if kind in GPUS else TPUS[kind]
    gpus, tpus = ", ".join(GPUS), ", ".join(TPUS)
    raise ValueError(
        f"topology {name!r} is not known; expected one of {gpus} as in 'h200:8', or of {tpus} as in 'v5e:2x4'"
    )


def _gpus(name: str, gpu: Gpu, count: str) -> list[jax.Device]:
    if not re.fullmatch(r"[1-9]\d*", count) or (int(count) > HOST_GPUS and int(count) % HOST_GPUS):
        raise ValueError(
            f"topology {name!r}: expected 1 to {HOST_GPUS} GPUs or a multiple of {HOST_GPUS} after the colon"
        )
    per_host = min(int(count), HOST_GPUS)
    shape = f"1x{int(count) // per_host}x{per_host}"
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="gpu", topology=shape, target_config=_target_config(gpu)
        )
    except NotImplementedError as error:
        raise RuntimeError(
            f"compiling for {name} needs the CUDA plugin of JAX, which is not loaded: {install('cuda')}, "
            "and set JAX_PLATFORMS=cpu where there is no GPU"
        ) from error
    return list(topology.devices)


def _target_config(gpu: Gpu) -> str:
    """A `stream_executor.GpuTargetConfigProto` as text."""
    major, minor = gpu.capability
    # Hopper's own matrix instructions (wgmma) are of the target sm_90a, not of sm_90.
    features = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
          core_count: {gpu.cores} fpus_per_core: {gpu.float32_units} clock_rate_ghz: {gpu.clock_ghz}
          device_memory_size: {gpu.memory} memory_bandwidth: {int(gpu.bandwidth)} l2_cache_size: {gpu.l2}
          shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {gpu.shared - 1024}
          shared_memory_per_block: 49152
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          threads_per_block_limit: 1024 threads_per_core_limit: 2048 threads_per_warp: 32
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
        device_description_str: "{gpu.name}"
    """


def _tpus(name: str, kind: str, shape: str) -> list[jax.Device]:
    sides = [int(side) for side in shape.split("x") if re.fullmatch(r"[1-9]\d*", side)]
    host = [*(min(side, 2) for side in sides[:2]), 1]
    example = "2x2x4" if kind == "v5p" else "2x4"
    axes = example.count("x")
    if shape.count("x") != axes or len(sides) <= axes or any(n % m for n, m in zip(sides, host)):
        raise ValueError(f"topology {name!r}: expected chips like {example} after the colon, the first two 1 or even")
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(f"compiling for {name} needs libtpu: {install('tpu')}")
    for key, value in NO_TPU_HERE.items():
        os.environ.setdefault(key, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=host)
    return list(topology.devices)

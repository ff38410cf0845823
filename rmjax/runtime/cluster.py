"""Where a process finds its place among those of its run.

environment                                                    set by
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID     launch/local.sh, launch/gke, you
SLURM_...                                                      srun with several tasks
OMPI_...                                                       mpirun
none: the host's own metadata                                  TPU VMs, TPUs on GKE
RMJAX_JOIN_SECONDS     how long all may take to come           you; 300 by default
"""

import contextlib
import dataclasses
import math
import os

JOIN_SECONDS = "RMJAX_JOIN_SECONDS"
TOLD = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place among the others."""

    address: str  # host:port of process 0
    count: int  # of processes
    number: int  # of this one
    devices: list[int] | None  # numbers of the host's GPUs that this process uses; None is all


def environment_number(name: str, default: float) -> float:
    """The number in a variable whose name ends with its unit; ValueError where it is no number from 0 on."""
    text = os.environ.get(name, str(default))
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < math.inf:
            return value
    raise ValueError(f"{name}={text}: expected a number of {name.rpartition('_')[2].lower()}, 0 or more")


def find_place() -> Place | None:
    """This process's place; None where it is the only one. ValueError where the environment is half set, or wrong."""
    if TOLD[1] in os.environ or TOLD[2] in os.environ:
        place = _told_place()
    elif method := _cluster():
        place = _detected_place(method)
    else:
        return None
    return place if place.count > 1 else None


def _told_place() -> Place:
    if missing := [name for name in TOLD if not os.environ.get(name)]:
        raise ValueError(f"of {', '.join(TOLD)} the environment lacks {', '.join(missing)}; set all, or none")
    address, count, number = (os.environ[name] for name in TOLD)
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise ValueError(f"{TOLD[1]}={count}, {TOLD[2]}={number}: expected a number of processes, and one below it")
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"{TOLD[0]}={address}: expected HOST:PORT of process 0")
    return Place(address, int(count), int(number), None)


def _cluster() -> str | None:
    """JAX's name of the cluster that started this process, if any; asks no network."""
    several = lambda name: int(os.environ.get(name, "1")) > 1
    if several("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in os.environ:  # a step; not the batch script itself
        return "slurm"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "ompi"
    from jax._src import cloud_tpu_init  # no public name tells whether there are TPU chips here

    if cloud_tpu_init.running_in_cloud_tpu_vm and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return "gketpu" if {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & set(os.environ) else "gcetpu"
    return None


def _detected_place(method: str) -> Place:
    """The place by JAX's own detection, which has no public name."""
    from jax._src.clusters import ClusterEnv

    seconds = int(environment_number(JOIN_SECONDS, 300))
    address, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get(TOLD[0]), None, None, None, method, seconds
    )
    if address is None or count is None or number is None:
        raise ValueError(
            f"this looks like a process of several ({method}), but JAX does not find the others; set {TOLD[0]}, "
            f"{TOLD[1]} and {TOLD[2]}"
        )
    if method == "slurm" and os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1":
        devices = None  # a task alone on its node has all of the node's GPUs, not only the first
    return Place(address, count, number, None if devices is None else list(devices))

"""Each process finds its place, or says what the environment lacks."""

import pytest

from rmjax.runtime import cluster

TOLD = {"JAX_COORDINATOR_ADDRESS": "host-a:1234", "JAX_NUM_PROCESSES": 4, "JAX_PROCESS_ID": 2}
STEP = {
    "SLURM_JOB_ID": 7,
    "SLURM_NTASKS": 2,
    "SLURM_PROCID": 1,
    "SLURM_LOCALID": 0,
    "SLURM_STEP_NODELIST": "node[003-004]",
}


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({}, None),
        (TOLD, ("host-a:1234", 4, 2, None)),
        ({**TOLD, "JAX_NUM_PROCESSES": 1, "JAX_PROCESS_ID": 0}, None),
        ({"JAX_COORDINATOR_ADDRESS": "host-a:1234"}, None),
        ({"SLURM_JOB_ID": 7, "SLURM_NTASKS": 2, "SLURM_PROCID": 0}, None),  # the batch script itself
        ({**STEP, "SLURM_NTASKS": 1, "SLURM_PROCID": 0}, None),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, ("node003:61447", 2, 1, None)),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": 1}, ("node003:61447", 2, 1, [1])),
    ],
)
def test_each_finds_its_place(environment, values, place):
    environment(**values)
    assert cluster.find_place() == (place and cluster.Place(*place))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "lacks JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "lacks JAX_COORDINATOR_ADDRESS"),
        ({"JAX_PROCESS_ID": 4}, "JAX_NUM_PROCESSES=4, JAX_PROCESS_ID=4: expected"),
        ({"JAX_COORDINATOR_ADDRESS": "host-a"}, "host-a: expected HOST:PORT"),
    ],
)
def test_half_of_what_is_needed_is_refused(environment, values, message):
    environment(**{**TOLD, **values})
    with pytest.raises(ValueError, match=message):
        cluster.find_place()

# SPDX-License-Identifier: Apache-2.0
"""Which devices are a process's own."""

import dataclasses

import pytest

from jaxllm.cluster.devices import check_devices, local_devices
from jaxllm.cluster.launch import Launch
from jaxllm.errors import InputError

STEP = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n1,n2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
GPUS = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, []),  # JAX's word for all
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, [1]),  # nothing says which
        (STEP | GPUS | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, []),
        (STEP | GPUS | {"SLURM_STEP_TASKS_PER_NODE": "4"}, [1]),
        (
            STEP | GPUS | {"SLURM_STEP_TASKS_PER_NODE": "1,2", "SLURM_NODEID": "1"},
            [2, 3],
        ),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "1"}, []),
        ({"JAX_LOCAL_DEVICE_IDS": "2"}, None),
    ],
)
def test_processes_of_a_node_share_its_gpus(environment, devices):
    assert local_devices(environment) == devices


def test_gpus_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(InputError, match="3 processes on a node where they see 4 GPUs"):
        local_devices(STEP | GPUS | {"SLURM_STEP_TASKS_PER_NODE": "3"})


@dataclasses.dataclass
class Device:
    process_index: int
    platform: str = "gpu"


def devices(*numbers: int, platform: str = "gpu") -> list[Device]:
    return [Device(i, platform) for i, n in enumerate(numbers) for _ in range(n)]


FOUR = Launch("a", (1,), 4, 0)
ON_NODES_OF_FOUR = STEP | GPUS | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}


@pytest.mark.parametrize(
    ("launch", "environment", "found"),
    [
        (None, {}, devices(1)),
        (None, {}, devices(8, platform="cpu")),
        (FOUR, ON_NODES_OF_FOUR, devices(4, 4, 4, 4)),
        (
            FOUR,
            ON_NODES_OF_FOUR | {"SLURM_STEP_TASKS_PER_NODE": "4"},
            devices(*[1] * 4),
        ),
        (
            FOUR,
            ON_NODES_OF_FOUR | {"JAX_PLATFORMS": "cpu"},
            devices(2, 2, 2, 2, platform="cpu"),
        ),
        (FOUR, STEP, devices(2, 2, 2, 2, platform="cpu")),
    ],
)
def test_devices_as_they_were_given_are_taken(launch, environment, found):
    check_devices(launch, environment, found)


@pytest.mark.parametrize(
    ("launch", "environment", "found", "message"),
    [
        (
            FOUR,
            ON_NODES_OF_FOUR,
            devices(4, 4, 3, 4),
            r"expected 4 processes x 4 GPUs, found 4 \+ 4 \+ 3 \+ 4 gpu",
        ),
        (
            FOUR,
            ON_NODES_OF_FOUR,
            devices(4, 4, 4),
            r"expected 4 processes x 4 GPUs, found 4 \+ 4 \+ 4 \+ 0 gpu",
        ),
        (
            FOUR,
            ON_NODES_OF_FOUR,
            devices(1, 1, 1, 1, platform="cpu"),
            "found .* cpu, by process; JAX has no CUDA here",
        ),
        (
            None,
            ON_NODES_OF_FOUR | {"SLURM_STEP_TASKS_PER_NODE": "1"},
            devices(1),
            "expected 1 process x 4 GPUs, found 1 gpu",
        ),
        (
            FOUR,
            {},
            devices(2, 1, 2, 2, platform="cpu"),
            "expected 4 processes x 2 cpu",
        ),
    ],
)
def test_devices_that_are_missing_are_named(launch, environment, found, message):
    with pytest.raises(InputError, match=message):
        check_devices(launch, environment, found)

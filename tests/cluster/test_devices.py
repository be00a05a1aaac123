# SPDX-License-Identifier: Apache-2.0
"""Which devices are a process's own, and those that JAX finds."""

import dataclasses
import sys

import jax
import pytest

from jaxllm.cluster.devices import check_devices, find_devices, local_devices
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


def test_the_cpu_is_taken_where_it_is_meant_or_all_that_there_is(tmp_path):
    (tmp_path / "nvidia0").touch()
    assert find_devices("cpu", tmp_path) == jax.devices()
    assert find_devices(None, tmp_path / "none") == jax.devices()


@pytest.mark.parametrize("platforms", [None, ""])
def test_the_cpu_is_refused_where_jax_leaves_a_gpu_unused(platforms, tmp_path):
    for name in ("nvidiactl", "nvidia0"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"has an NVIDIA GPU.*JAX_PLATFORMS=cpu if"):
        find_devices(platforms, tmp_path)


def test_the_cpu_is_refused_where_a_plugin_for_gpus_did_not_start(
    tmp_path, monkeypatch
):
    plugin = tmp_path / "jax_plugins" / "xla_cuda12"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jax_plugins", raising=False)
    with pytest.raises(
        InputError, match=r"plugin jax_plugins\.xla_cuda12 is installed"
    ):
        find_devices(None, tmp_path)
    monkeypatch.delitem(sys.modules, "jax_plugins", raising=False)


@pytest.mark.parametrize("platforms", ["cuda", "gpu", "nonsense"])
def test_a_platform_without_a_device_is_one_message(
    platforms, tiny, tmp_path, start_processes
):
    env = {"JAX_PLATFORMS": platforms}
    alone = start_processes(tiny(), tmp_path, 1, 1, "run", env=env)
    assert alone.wait() == [2]
    (said,) = alone.said(0).splitlines()
    assert said.startswith(f"error: JAX_PLATFORMS={platforms}: JAX finds no device: ")
    assert said.endswith("or set JAX_PLATFORMS=cpu if the CPU is meant.")
    assert not (tmp_path / "run").exists()

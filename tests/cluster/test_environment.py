# SPDX-License-Identifier: Apache-2.0
"""Flags for GPUs: known to this jaxlib, checked, overridable, and not set on CPUs."""

import importlib.metadata

import pytest

from jaxllm.cluster.environment import (
    FLAGS,
    VARIABLES,
    XLA_FLAGS,
    describe_flags,
    has_gpus,
    prepare_gpus,
)
from jaxllm.errors import InputError

HERE = ".".join(importlib.metadata.version("jaxlib").split(".")[:2])
OURS = " ".join(f"--{flag.name}={flag.value}" for flag in FLAGS[HERE])
FOR_A_GPU = """
import jax
from pallas_kernels import offline
mesh = offline.described_mesh()
with jax.set_mesh(mesh):
    x = jax.ShapeDtypeStruct((8,), "float32", sharding=jax.NamedSharding(mesh, jax.P()))
    jax.jit(lambda x: x + 1).lower(x).compile()
"""
HIDING = "--xla_gpu_enable_latency_hiding_scheduler"


def test_every_flag_of_this_version_is_known_to_it():
    environment = {XLA_FLAGS: OURS}
    prepare_gpus(environment, gpus=False)  # it checks what is set
    assert environment == {XLA_FLAGS: OURS}


@pytest.mark.slow
def test_every_flag_is_known_to_the_plugin_for_gpus(run_offline):
    for flags, known in ((OURS, True), (f"{OURS} --xla_gpu_none=1", False)):
        ended = run_offline(["-c", FOR_A_GPU], XLA_FLAGS=flags)
        assert (ended.returncode == 0) == known, ended.stderr
        assert ("Unknown flag" in ended.stderr) != known


def test_gpus_get_all_of_them_and_cpus_none():
    environment = {}
    prepare_gpus(environment, gpus=False)
    assert environment == {} and describe_flags(environment) == ""
    prepare_gpus(environment, gpus=True)
    assert environment == {XLA_FLAGS: OURS} | {v.name: v.value for v in VARIABLES}
    shown = describe_flags(environment)
    for name, value in environment.items():
        assert f"\n{name:<16} {value}" in shown


def test_what_is_set_already_is_kept():
    environment = {
        XLA_FLAGS: f"{HIDING}=false",
        "NCCL_DEBUG": "INFO",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
    }
    prepare_gpus(environment, gpus=True)
    assert environment[XLA_FLAGS].count(HIDING) == 1
    assert environment[XLA_FLAGS].startswith(f"{HIDING}=false ")
    assert environment["NCCL_DEBUG"] == "INFO"
    assert "XLA_CLIENT_MEM_FRACTION" not in environment


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--xla_gpu_none=1",
            r"has --xla_gpu_none=1, which jaxlib [\d.]+ does not know",
        ),
        (f"{HIDING}=maybe", r"maybe' cannot be read by jaxlib .* of its flag's type"),
    ],
)
def test_flags_that_would_end_the_process_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        prepare_gpus({XLA_FLAGS: flags}, gpus=False)


def test_gpus_are_there_if_jax_may_use_them_and_the_machine_has_them(tmp_path):
    assert not has_gpus(None, tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not has_gpus(None, tmp_path)
    (tmp_path / "nvidia0").touch()
    assert has_gpus(None, tmp_path) and has_gpus("cuda,cpu", tmp_path)
    assert not has_gpus("cpu", tmp_path)


def test_a_command_refuses_an_unknown_flag(tmp_path, run_command):
    ended = run_command("train --config=none.py", tmp_path, XLA_FLAGS="--xla_none=1")
    assert ended.status == 2
    assert "--xla_none=1" in ended.stderr and "Traceback" not in ended.stderr

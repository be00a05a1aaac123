# SPDX-License-Identifier: Apache-2.0
"""The device that a computation is traced for, here or described."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import mosaic
from pallas_kernels.target import H200, INTERPRETED, Target, current_target, traced_for


def described(kind: str, platform: str = "gpu") -> AbstractMesh:
    device = AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    return AbstractMesh((), (), (), abstract_device=device)


def test_without_a_mesh_the_target_is_this_machine():
    assert current_target().platform == "cpu"
    assert not current_target().is_hopper


def test_a_mesh_of_this_machine_is_no_gpu():
    with jax.set_mesh(jax.make_mesh((8,), ("a",))):
        assert current_target().platform == "cpu"


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_a_described_device_is_the_target(platform):
    with use_abstract_mesh(described("NVIDIA H200", platform)):
        assert current_target() == H200


def test_a_program_can_be_traced_for_a_device_that_is_not_there():
    with traced_for(H200):
        assert current_target() == H200
    assert current_target().platform == "cpu"


@pytest.mark.parametrize(
    ("kind", "is_hopper"),
    [
        ("NVIDIA H200", True),
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA B200", False),
        ("NVIDIA GeForce RTX 4090", False),
    ],
)
def test_only_a_hopper_runs_kernels_that_need_its_instructions(kind, is_hopper):
    assert Target("gpu", kind, 132).is_hopper == is_hopper


def test_interpret_mode_is_a_hopper_of_two_cores_while_it_lasts():
    with mosaic.interpret():
        assert current_target() == INTERPRETED
        assert current_target().is_hopper
    assert current_target() != INTERPRETED

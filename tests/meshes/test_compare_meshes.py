# SPDX-License-Identifier: Apache-2.0
"""The command that compares meshes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import compare_meshes
from jaxllm.compare_meshes import (
    Comparison,
    compare,
    follow_one,
    parse_meshes,
    standard_meshes,
    tolerance_of,
)
from jaxllm.config import MeshConfig
from jaxllm.errors import InputError

MESHES = [{"fsdp": 4}, {"tensor": 16}, {"tensor": 4}, {"expert": 2}, {"rows": 2}]


def test_meshes_are_compared_or_refused_with_the_reason(tiny):
    one = follow_one(tiny(), 2)
    fits, too_large, uncut, dense, unknown = compare(tiny(), MESHES, one)
    assert one.documents == 1  # files longer than rows
    assert (fits.mesh, fits.refusal, fits.changed) == ("fsdp 4", "", ())
    assert (len(fits.losses), fits.agrees(1e-6)) == (2, True)
    assert "needs 16 devices" in too_large.refusal
    assert "not a multiple of mesh tensor=4" in uncut.refusal
    assert "config.mesh.expert=2 needs experts" in dense.refusal
    assert "['rows'] are unknown" in unknown.refusal


def test_other_parameters_on_another_mesh_are_found(tiny, monkeypatch):
    def init_state(setup):
        state = honest(setup)
        if setup.mesh.size == 1:
            return state
        move = jax.jit(lambda x: jnp.where(x == x.max(), x + 1e-7, x))
        with jax.set_mesh(setup.mesh):
            params = jax.tree.map(move, state.params)
        return dataclasses.replace(state, params=params)

    honest = compare_meshes.init_state
    monkeypatch.setattr(compare_meshes, "init_state", init_state)
    [found] = compare(tiny(), [{"data": 2}], follow_one(tiny(), 1))
    assert len(found.changed) > 0
    assert not found.agrees(1.0)


def test_a_loss_beyond_the_tolerance_does_not_agree():
    assert Comparison("data 2", losses=(0.0, 1e-6)).agrees(1e-6)
    for losses, num_equal in (((0.0, 1.1e-6, 0.0), 1), ((np.nan, 0.0), 0)):
        far = Comparison("data 2", losses=losses)
        assert not far.agrees(1e-6)
        assert far.num_equal(1e-6) == num_equal


def test_only_a_choice_of_experts_widens_the_tolerance(tiny):
    experts = {"model.moe.num_experts": 4}
    every = experts | {"model.moe.experts_per_token": 4}
    found = [tolerance_of(tiny(changes).model) for changes in ({}, every, experts)]
    assert found == [1e-6, 1e-6, 1e-3]


def test_a_tolerance_may_be_zero_and_must_be_a_number(tiny):
    model = tiny().model
    assert [tolerance_of(model, asked) for asked in (None, 0.0, 0.5)] == [1e-6, 0, 0.5]
    for asked in (math.nan, math.inf, -0.1):
        with pytest.raises(InputError, match=f"--tolerance={asked} must be"):
            tolerance_of(model, asked)


def test_the_standard_meshes_have_each_axis_alone_and_each_two():
    meshes = standard_meshes(8)
    axes = list(MeshConfig().sizes)
    num_pairs = len(axes) * (len(axes) - 1) // 2
    assert meshes[: len(axes)] == [{axis: 8} for axis in axes]
    assert [len(sizes) for sizes in meshes[len(axes) :]] == [2] * num_pairs + [3] * 6
    assert all(np.prod(list(sizes.values())) == 8 for sizes in meshes)
    assert standard_meshes(3) == [{axis: 3} for axis in axes]


def test_meshes_are_read_as_they_are_written():
    read = parse_meshes("data=8 fsdp=4,tensor=2")
    assert read == [{"data": 8}, {"fsdp": 4, "tensor": 2}]


@pytest.mark.parametrize(
    "text",
    ["data", "data=x", "data=2=3", "data=2, fsdp=2", "data=0", "data=4294967296"],
)
def test_meshes_written_otherwise_are_refused(text):
    with pytest.raises(InputError, match="must be meshes between spaces"):
        parse_meshes(text)

# SPDX-License-Identifier: Apache-2.0
"""Sizes of mesh axes, and meshes with and without devices."""

import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding import AXES, ShardingError, abstract_mesh, make_mesh, resolve_sizes


def test_minus_one_is_what_the_other_axes_leave():
    full = resolve_sizes(dict(data=2, fsdp=-1, tensor=2), 16)
    assert full == dict(stage=1, data=2, fsdp=4, expert=1, context=1, tensor=2)
    assert resolve_sizes(dict(fsdp=-1), 1)["fsdp"] == 1


def test_axes_left_out_have_size_1_and_keep_their_order():
    assert resolve_sizes({}, 1) == dict.fromkeys(AXES, 1)
    assert tuple(resolve_sizes(dict(tensor=8), 8)) == AXES


@given(
    st.fixed_dictionaries({}, optional={a: st.sampled_from([1, 2, 3]) for a in AXES}),
    st.sampled_from(AXES),
    st.integers(1, 4),
)
def test_resolved_sizes_multiply_to_the_number_of_devices(sizes, free, rest):
    sizes = {**sizes, free: -1}
    num_devices = math.prod(size for size in sizes.values() if size != -1) * rest
    full = resolve_sizes(sizes, num_devices)
    assert math.prod(full.values()) == num_devices
    assert full[free] == rest


@pytest.mark.parametrize(
    "sizes",
    [
        dict(data=3),
        dict(data=16),
        dict(data=3, fsdp=-1),
        dict(data=-1, fsdp=-1),
        dict(data=4),
        {},
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_sizes_that_do(sizes):
    with pytest.raises(ShardingError) as error:
        resolve_sizes(sizes, 8)
    text = str(error.value)
    assert "config.mesh" in text
    assert "8 device(s)" in text
    assert "[1, 2, 4, 8]" in text
    for axis, size in sizes.items():
        assert f"'{axis}': {size}" in text


def test_an_unknown_axis_is_refused_with_the_known_ones():
    with pytest.raises(ShardingError, match=r"'model'.*unknown.*'fsdp'"):
        resolve_sizes(dict(model=2), 2)


def test_a_mesh_has_every_axis_explicit_and_the_devices_given():
    mesh = make_mesh(dict(tensor=2, fsdp=-1), jax.devices()[:4])
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    assert dict(mesh.shape) == resolve_sizes(dict(tensor=2, fsdp=2), 4)
    assert set(mesh.devices.flat) == set(jax.devices()[:4])


def test_a_mesh_is_made_of_all_devices_unless_told():
    assert make_mesh(dict(data=-1)).shape["data"] == len(jax.devices())


def test_an_abstract_mesh_has_more_devices_than_the_machine():
    mesh = abstract_mesh(dict(data=64, fsdp=8, tensor=8))
    assert mesh.size == 4096
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}

# SPDX-License-Identifier: Apache-2.0
"""The bill of a program's communication, on programs whose communication is known."""

import jax
import jax.numpy as jnp
import pytest

import sharding
from jaxllm.inspect.collectives import Collective, bill, read_collectives

MESH = dict(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(MESH)


def compiled(mesh, function, shape, spec, out=None) -> list[Collective]:
    """Returns the collectives of a function of blocks, as XLA compiled it."""
    run = jax.shard_map(
        function, mesh=mesh, in_specs=spec, out_specs=out or spec, check_vma=False
    )
    argument = jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec)
    )
    text = jax.jit(run).lower(argument).compile().as_text()
    assert text is not None
    return read_collectives(text, mesh)


CASES = {
    # kind: (function of a block, bytes a device puts in, times others / group)
    "all-gather": (lambda x, a: jax.lax.all_gather(x, a, tiled=True)[: len(x)], 1),
    "all-reduce": (lambda x, a: jax.lax.psum(x, a), 2 / 2),
    "reduce-scatter": (
        lambda x, a: jnp.tile(jax.lax.psum_scatter(x, a, tiled=True), (2, 1)),
        1 / 2,
    ),
    "all-to-all": (lambda x, a: jax.lax.all_to_all(x, a, 0, 0, tiled=True), 1 / 2),
    "collective-permute": (lambda x, a: jax.lax.ppermute(x, a, [(0, 1), (1, 0)]), 1),
}


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
@pytest.mark.parametrize("kind", CASES)
def test_each_kind_is_read_with_its_axis_and_bytes(mesh, kind, axis):
    function, share = CASES[kind]
    spec = jax.P(("data", "fsdp", "tensor"))
    [found] = compiled(mesh, lambda x: function(x, axis), (64, 4), spec)
    assert (found.kind, found.axes, found.group) == (kind, (axis,), 2)
    # XLA cuts what an all-to-all sends into a part for each receiver.
    assert found.arrays in (("f32[8,4]",), ("f32[4,4]",) * 2)
    assert found.num_bytes == 8 * 4 * 4
    assert found.wire_bytes == share * found.num_bytes
    assert (found.count, found.loop) == (1, "")


def test_a_sum_over_two_axes_is_one_collective_of_both(mesh):
    spec = jax.P(("data", "fsdp", "tensor"))
    [found] = compiled(mesh, lambda x: jax.lax.psum(x, ("data", "tensor")), (8,), spec)
    assert (found.axes, found.group) == (("data", "tensor"), 4)


def test_a_collective_in_nested_loops_is_counted_for_each_turn(mesh):
    def function(x):
        def inner(x, _):
            return jax.lax.ppermute(jnp.sin(x), "fsdp", [(0, 1), (1, 0)]), None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=5)[0] * 2, None

        return jax.lax.scan(outer, x, length=3)[0]

    [found] = compiled(mesh, function, (8,), jax.P("fsdp"))
    assert found.count == 15
    assert "while" in found.loop


def test_collectives_between_axes_of_size_one_are_left_out():
    mesh = sharding.make_mesh(dict(data=8))
    assert (
        compiled(mesh, lambda x: jax.lax.psum(x, "tensor"), (8,), jax.P("data")) == []
    )


def test_the_line_that_asked_is_named(mesh):
    [found] = compiled(mesh, lambda x: jax.lax.psum(x, "data"), (8,), jax.P("data"))
    assert found.source.startswith("inspect/test_collectives.py:")
    assert found.op_name.endswith("psum")


def test_the_bill_lists_the_dearest_first_and_adds_up_each_axis(mesh):
    def function(x):
        total = jax.lax.psum(x[:1], "tensor")
        return jax.lax.all_gather(x, "data", tiled=True)[: len(x)] + total

    found = compiled(mesh, function, (64, 64), jax.P(("data", "fsdp", "tensor")))
    _, header, first, second, _, *sums = bill(found).splitlines()
    assert header.startswith("collective")
    assert first.startswith("all-gather")
    assert second.startswith("all-reduce")
    assert sorted(sums) == ["data: 0.00 MiB exposed", "tensor: 0.00 MiB exposed"]


NOTATIONS = {
    "replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'tensor'}": ("tensor",),
    "replica_groups=mesh['a'=4,'b'=2] {'a'}": ("data", "fsdp"),
    "replica_groups=[4,2]<=[8]": ("tensor",),
    "replica_groups=[4,2]<=[2,2,2]T(0,2,1)": ("fsdp",),
    "replica_groups=[1,8]<=[8]": ("data", "fsdp", "tensor"),
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": ("data",),
    "replica_groups={}": ("data", "fsdp", "tensor"),
    "replica_groups={{0,3},{1,2},{4,7},{5,6}}": None,
}


@pytest.mark.parametrize("groups", NOTATIONS)
def test_groups_are_read_however_xla_writes_them(mesh, groups):
    text = (
        "ENTRY %main (p: f32[8]) -> f32[8] {\n"
        "  %p = bf16[8,2]{1,0} parameter(0)\n"
        f"  %r = bf16[8,2]{{1,0}} all-reduce(%p), {groups}, to_apply=%add\n}}"
    )
    [found] = read_collectives(text, mesh)
    assert found.axes == NOTATIONS[groups]
    assert found.num_bytes == 32


GPU = """
%body (p: (f32[8])) -> (f32[8]) {
  %p = (f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=0
  %s = ((f32[8]{0}), f32[64]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8]
  %BETWEEN
  %d = f32[64]{0} all-gather-done(%s)
  ROOT %t = (f32[8]{0}) tuple(%x)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %a = (f32[8]{0}) parameter(0)
  %w = (f32[8]{0}) while(%a), condition=%c, body=%body, metadata={op_name="layers"}, \
backend_config={"known_trip_count":{"n":"32"}}
}
"""


@pytest.mark.parametrize(
    ("between", "hidden"),
    [
        ("f = f32[8]{0} fusion(%x), kind=kLoop, calls=%c", True),
        ("f = f32[8]{0} bitcast(%x)", False),
        ("f = f32[8]{0} all-reduce(%x), replica_groups={{0}}", False),
    ],
)
def test_only_computation_between_start_and_end_hides_a_collective(
    mesh, between, hidden
):
    [found] = read_collectives(GPU.replace("BETWEEN", between), mesh)
    assert found.overlapped is hidden
    assert (found.count, found.loop) == (32, "layers")
    assert found.wire_bytes == 7 * 32

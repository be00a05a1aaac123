# SPDX-License-Identifier: Apache-2.0
"""Arrays moved and multiplied by their letters.

Every function reads the mesh from `jax.set_mesh`; without one it does plain JAX, so
the same model runs on any mesh and on none. Where communication happens is visible in
the text: `gather` and `constrain` move data, `einsum` adds partial sums.
"""

from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp

from sharding.rules import (
    COMPUTE,
    STORAGE,
    Table,
    axes_of_entry,
    cutting,
    free_axes,
    spec,
)

Out = str | jax.P | None  # letters or a spec; there is none without a mesh


def out_sharding(letters: str, table: Table = COMPUTE) -> jax.P | None:
    """Returns the spec for an operation's `out_sharding=`; None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else spec(letters, table, mesh)


def axes_of(letter: str) -> tuple[str, ...]:
    """Returns the free mesh axes that shard this letter in COMPUTE."""
    free = free_axes(jax.sharding.get_abstract_mesh())
    return tuple(axis for axis in COMPUTE.get(letter, ()) if axis in free)


def einsum(
    subscripts: str,
    *operands: jax.Array,
    table: Table = COMPUTE,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Contracts operands whose subscripts are letters; the result lies as table says.

    A contraction over a sharded dim adds the partial sums of the devices.

    Args:
      subscripts: as for `jnp.einsum`, with capitals of the alphabet and no `...`.
      operands: arrays placed by COMPUTE.
      table: places the result.
      dtype: of the accumulation and the result; default: the operands'.
    """
    letters = subscripts.partition("->")[2]
    return jnp.einsum(
        subscripts,
        *operands,
        preferred_element_type=dtype,
        out_sharding=out_sharding(letters, table),
    )


def add_products(
    *products: tuple[str, jax.Array, jax.Array], like: jax.Array
) -> jax.Array:
    """Returns the sum of contractions to the same letters, by one sum over devices.

    Each device adds up its own parts of all products first. JAX's `unreduced` types say
    the same, but not inside `along`: jaxlib 0.12 aborts there, and jax 0.11 asserts.

    Args:
      products: subscripts and operands as for `einsum`.
      like: lies where the result shall: as COMPUTE says or sharded further.
    """
    each = [subscripts.partition("->")[::2] for subscripts, _, _ in products]
    axes = {_contracted_axes(subscripts) for subscripts, _, _ in products}
    assert len({out for _, out in each}) == len(axes) == 1, "parts of different sums"
    summed, target = axes.pop(), spec_of(like)

    def block(*operands: jax.Array) -> jax.Array:
        pairs = zip(operands[::2], operands[1::2], products, strict=True)
        first, *rest = [jnp.einsum(name, x, y) for x, y, (name, _, _) in pairs]
        return _add_up(sum(rest, first), summed, target)

    ins = [operand for inputs, _ in each for operand in inputs.split(",")]
    operands = [operand for _, x, y in products for operand in (x, y)]
    return local(block, ins, target)(*operands)


def _contracted_axes(subscripts: str) -> frozenset[str]:
    """Returns the mesh axes along which devices have parts of a contraction's sum."""
    ins, _, out = subscripts.partition("->")
    summed = set(ins.replace(",", "")) - set(out)
    return frozenset(axis for letter in summed for axis in axes_of(letter))


def _add_up(partial: jax.Array, axes: Set[str], target: jax.P | None) -> jax.Array:
    """Adds up each device's part over axes: an all-reduce, or reduce-scatter to target.

    Only inside `local`.
    """
    left = set(axes)
    for dim, entry in enumerate(target or ()):
        if scattered := tuple(a for a in axes_of_entry(entry) if a in left):
            left -= set(scattered)
            partial = jax.lax.psum_scatter(
                partial, scattered, scatter_dimension=dim, tiled=True
            )
    return jax.lax.psum(partial, tuple(sorted(left))) if left else partial


def constrain(x: jax.Array, letters: str, table: Table = COMPUTE) -> jax.Array:
    """Returns x placed as table says, moving data where it is not there yet."""
    target = out_sharding(letters, table)
    return x if target is None else jax.sharding.reshard(x, target)


def spec_of(x: jax.Array) -> jax.P | None:
    """Returns the partition spec of x; None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else jax.typeof(x).sharding.spec


def place_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Returns x placed as another array with the same dims is."""
    target = spec_of(other)
    return x if target is None else jax.sharding.reshard(x, target)


def gather(w: jax.Array, letters: str, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns a parameter cast to dtype, then moved from STORAGE to COMPUTE.

    The cast comes first, so that the all-gather moves the narrow type.
    """
    return constrain(w.astype(dtype), letters)


def local(
    function: Callable[..., Any],
    ins: Sequence[Out],
    outs: Out | tuple[Out, ...],
) -> Callable[..., Any]:
    """Wraps a function of blocks in `shard_map`: each device gets its part by COMPUTE.

    Gradients are right if no device's part of a result needs another device's part of
    an argument: that of an argument is added up, in the argument's dtype, over the mesh
    axes that shard other arguments and not this one. A function may gather other parts
    itself, and then adds up what it returns to them.

    Args:
      function: takes one array for each entry of ins; sees local shapes only.
      ins: letters of the arguments, or their specs.
      outs: the same of the result, or of each of several.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def place(out: Any) -> Any:
        if isinstance(out, tuple) and not isinstance(out, jax.P):
            return tuple(map(place, out))
        return spec(out, COMPUTE, mesh) if isinstance(out, str) else out

    return _local(function, tuple(map(place, ins)), place(outs))


def _local(function, in_specs, out_specs):
    """Differentiates inside `shard_map`, each device its own part.

    The transpose that JAX makes of a `shard_map` adds gradients up along every axis
    that does not shard an argument, also along those that shard nothing here.
    """
    cuts = [
        {axis for entry in each for axis in axes_of_entry(entry)} for each in in_specs
    ]
    axes = tuple(sorted(set().union(*cuts)))

    mesh = jax.sharding.get_abstract_mesh()
    free = free_axes(mesh)
    manual = jax.sharding.AxisType.Manual
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = {axis for axis, kind in kinds if kind != manual}

    def over_devices(block, ins, outs):
        def traced(*args):
            with cutting(free):
                return block(*args)

        # Around this there may be `along`: its axis stays as it is.
        return jax.shard_map(
            traced, in_specs=ins, out_specs=outs, axis_names=names, check_vma=False
        )

    @jax.custom_vjp
    def over_parts(*args):
        return over_devices(function, in_specs, out_specs)(*args)

    def forward(*args):
        def block(*args):
            out, pullback = jax.vjp(function, *args)
            # Each device keeps what it saved, whatever that is, as one row of an array.
            return out, jax.tree.map(lambda saved: saved[None], pullback)

        return over_devices(block, in_specs, (out_specs, jax.P(axes)))(*args)

    def backward(pullback, d_out):
        def block(pullback, d_out):
            gradients = jax.tree.map(lambda row: row[0], pullback)(d_out)
            return tuple(map(add_up, gradients, cuts))

        return over_devices(block, (jax.P(axes), out_specs), in_specs)(pullback, d_out)

    def add_up(gradient, cut):
        if gradient.dtype == jax.dtypes.float0:  # of whole numbers
            return None
        others = tuple(axis for axis in axes if axis not in cut)
        return jax.lax.psum(gradient, others) if others else gradient

    over_parts.defvjp(forward, backward)
    return over_parts


def along(
    axes: str | tuple[str, ...], function: Callable[..., Any], ins: Any, outs: Any
) -> Callable[..., Any]:
    """Wraps a function in `shard_map` over some mesh axes, and leaves the others.

    Inside, the tables do as if these axes were not there: each of their devices, with
    theirs along the other axes, runs the function on its own part. XLA aborts where one
    of these is inside another whose axes come later in the mesh.

    Args:
      axes: one or more of the mesh.
      function: may use everything here, `local` too, and collectives over axes; a
        `jax.grad` inside is that of the sum of what all devices along axes return.
      ins: specs that name no other axis, one for each argument, or trees of them.
      outs: the same of the result.
    """
    names = {axes} if isinstance(axes, str) else set(axes)
    return jax.shard_map(
        function, in_specs=ins, out_specs=outs, axis_names=names, check_vma=False
    )


def add_along(letter: str, x: jax.Array) -> jax.Array:
    """Returns the sum of x over the axes of a letter that `along` has taken, if any.

    Outside of `local`: what is a sum over the whole batch there is one over the rows of
    a replica inside of `along("data", ...)`, which this completes.
    """
    manual = jax.sharding.AxisType.Manual
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    taken = tuple(a for a in COMPUTE[letter] if kinds.get(a) == manual)
    return jax.lax.psum(x, taken) if taken else x


def reduce_to_storage(partial: jax.Array, letters: str) -> jax.Array:
    """Adds up each device's gradient of a parameter, leaving it sharded as in STORAGE.

    Only inside `local`: partial is a sum over this device's part of the batch, sharded
    by COMPUTE like the parameter in use. An axis that shards the parameter then has
    brought it the whole batch along that axis already, as `expert` does.
    """
    in_use = {axis for letter in letters for axis in axes_of(letter)}
    left = {axis for letter in "BT" for axis in axes_of(letter)} - in_use
    return _add_up(partial, left, out_sharding(letters, STORAGE))

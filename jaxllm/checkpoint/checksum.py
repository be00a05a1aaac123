# SPDX-License-Identifier: Apache-2.0
"""Checksums of arrays, the same on every mesh, computed on the devices.

A flipped bit on the way to the disk, on it or back changes the sum. They are sums
modulo 2**32 of hashed elements, so no order of additions matters and each device adds
up what it has: one pass over memory, and no copy of an array. XLA fuses that on a GPU
and not on a CPU, so one device goes by blocks.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 2**23  # elements
_SALTS = (0x243F6A88, 0x85A308D3)  # digits of pi: two sums, 64 bits in all


def checksums(tree: Any) -> dict[str, str]:
    """Returns 16 hexadecimal digits for each array of a tree, by its path."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        return {}
    place = leaves[0].sharding
    mesh = place.mesh if isinstance(place, jax.NamedSharding) else None
    assert not isinstance(mesh, jax.sharding.AbstractMesh), "arrays are on devices"
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        sums = _sums_on(mesh)(leaves)
    digits = ["".join(f"{int(part):08x}" for part in row) for row in np.asarray(sums)]
    return dict(zip(paths, digits, strict=True))


@functools.cache
def _sums_on(mesh: jax.sharding.Mesh | None) -> Callable[..., jax.Array]:
    """Returns `_sums`, compiled once for a mesh and a tree."""
    if mesh is None or mesh.size == 1:
        return jax.jit(_stacked(_sums_by_blocks))
    return jax.jit(jax.sharding.auto_axes(_stacked(_sums), out_sharding=jax.P()))


def _stacked(
    sums: Callable[[jax.Array], jax.Array],
) -> Callable[[list[jax.Array]], jax.Array]:
    """Returns a function to uint32 [arrays, 2]."""
    return lambda leaves: jnp.stack([sums(leaf) for leaf in leaves])


def _sums_by_blocks(x: jax.Array) -> jax.Array:
    """Returns the sums of `_sums`, adding up some rows at a time."""
    if x.size <= _BLOCK:
        return _sums(x)
    size = x.shape[0]
    most = max(_BLOCK * size // x.size, 1)
    rows = next(number for number in range(most, 0, -1) if size % number == 0)

    def add(index: jax.Array, sums: jax.Array) -> jax.Array:
        first = index * rows
        block = jax.lax.dynamic_slice_in_dim(x, first, rows)
        return sums + _sums(block, first.astype(jnp.uint32))

    with_nothing = jnp.zeros(len(_SALTS), jnp.uint32)
    return jax.lax.fori_loop(0, size // rows, add, with_nothing)


def _sums(x: jax.Array, first: jax.Array | None = None) -> jax.Array:
    """Returns uint32 [2], of rows from `first` on."""
    return jnp.stack([_sum(x, salt, first) for salt in _SALTS])


def _sum(x: jax.Array, salt: int, first: jax.Array | None) -> jax.Array:
    bits = _bits(x)
    place = jnp.full(bits.shape, salt, jnp.uint32)
    for dim in range(bits.ndim):  # a multiplication for each: no index can overflow
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
        if dim == 0 and first is not None:
            along += first
        place = _mix(place + along)
    return _mix(bits ^ place).sum(dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Returns a one-to-one scrambling of 32 bits (Wellons, "hash prospector")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)

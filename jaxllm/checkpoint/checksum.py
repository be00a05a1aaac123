# SPDX-License-Identifier: Apache-2.0
"""Checksums of arrays, the same on every mesh, computed on the devices.

A flipped bit on the way to the disk, on it or back changes the sum. They are sums
modulo 2**32 of hashed elements, so no order of additions matters and each device adds
up what it has: one pass over memory, no copy.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    if mesh is None:
        return jax.jit(_sums)
    return jax.jit(jax.sharding.auto_axes(_sums, out_sharding=jax.P()))


def _sums(leaves: list[jax.Array]) -> jax.Array:
    """Returns uint32 [arrays, 2]."""
    return jnp.stack([jnp.stack([_sum(x, salt) for salt in _SALTS]) for x in leaves])


def _sum(x: jax.Array, salt: int) -> jax.Array:
    bits = _bits(x)
    place = jnp.full(bits.shape, salt, jnp.uint32)
    for dim in range(bits.ndim):  # a multiplication for each: no index can overflow
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
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

# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens sharded so that, under a causal mask, every device has the same work.

Late tokens see more than early ones. With C devices along T's axis a row is 2 C chunks
of equal length, and device c holds the chunks c and 2 C - 1 - c: an early one and the
late one that makes up for it. Code between `to_zigzag` and the loss need not know, as
long as it looks at tokens one by one.

Source: the order of Brandon et al., "Striped Attention" (arXiv:2311.09431), made of
chunks instead of single tokens, as in Zhu's ring-flash-attention.
"""

import jax
import jax.numpy as jnp

from sharding.arrays import axes_of, local
from sharding.errors import ShardingError
from sharding.rules import AnyMesh

DIM = 1  # T of what these functions take


def to_zigzag(*rows_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Returns whole numbers of each token with the columns in zig-zag order.

    The arrays are global ones, in the order of the text; without an axis that shards T
    they stay as they are. All go in one all-gather of rows of 4-byte numbers.
    """
    axes = axes_of("T")
    if not axes:
        return rows_BT

    def block(*rows_BT):
        stacked = jnp.stack(rows_BT, 2)
        stacked = jax.lax.all_gather(stacked, axes, axis=DIM, tiled=True)
        return tuple(jnp.unstack(own_part(stacked), axis=2))

    letters = ("BT",) * len(rows_BT)
    return local(block, letters, letters)(*rows_BT)


def check_length(setting: str, length: int, mesh: AnyMesh) -> None:
    """Refuses rows that have no 2 C chunks of equal length.

    Raises:
      ShardingError: names the setting, and lengths that have.
    """
    size = mesh.shape.get("context", 1)
    if size == 1 or length % (2 * size) == 0:
        return
    below = length // (2 * size) * 2 * size
    lengths = f"{below} or {below + 2 * size}" if below else f"{2 * size}"
    fits = [c for c in range(1, size + 1) if c == 1 or length % (2 * c) == 0]
    raise ShardingError(
        f"{setting}={length}: T (query positions) is not a multiple of 2 * mesh "
        f"context={size}, of which every device takes two chunks, an early and a late "
        f"one; use {setting}={lengths}, or context one of {fits}."
    )


# The functions below are for the inside of `local`, where T is sharded.


def own_part(x: jax.Array) -> jax.Array:
    """Returns this device's two chunks of whole rows in the order of the text."""
    size, device = _place()
    width = x.shape[DIM] // (2 * size)
    first, second = (
        jax.lax.dynamic_slice_in_dim(x, chunk * width, width, DIM)
        for chunk in (device, 2 * size - 1 - device)
    )
    return jnp.concatenate([first, second], DIM)


def gather_rows(x: jax.Array) -> jax.Array:
    """Returns whole rows in the order of the text, from every device's two chunks."""
    size, _ = _place()
    x = jax.lax.all_gather(x, axes_of("T"), axis=DIM, tiled=True)
    chunks = jnp.split(x, 2 * size, DIM)
    return jnp.concatenate(chunks[::2] + chunks[::-2], DIM)


def scatter_rows(x: jax.Array) -> jax.Array:
    """Adds up whole rows of all devices; each keeps its two chunks of the sum."""
    size, _ = _place()
    chunks = jnp.split(x, 2 * size, DIM)
    held = [chunk for c in range(size) for chunk in (chunks[c], chunks[-1 - c])]
    x = jnp.concatenate(held, DIM)
    return jax.lax.psum_scatter(x, axes_of("T"), scatter_dimension=DIM, tiled=True)


def num_before(place: jax.Array, device: jax.Array, length: int) -> jax.Array:
    """Returns how many tokens of a device come before a place in the text.

    Those it holds are in order, so that a range of places is one of theirs.

    Args:
      place: int32, of any shape.
      device: int32 [], along T's axis.
      length: tokens of a row that a device holds.
    """
    size, _ = _place()
    width = length // 2
    first, second = (
        jnp.clip(place - chunk * width, 0, width)
        for chunk in (device, 2 * size - 1 - device)
    )
    return first + second


def _place() -> tuple[int, jax.Array]:
    """Returns the number of devices along T's axis, and which of them this is."""
    axes = axes_of("T")
    return jax.lax.axis_size(axes), jax.lax.axis_index(axes)

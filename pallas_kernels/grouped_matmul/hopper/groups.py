# SPDX-License-Identifier: Apache-2.0
"""Which tile is whose: small int32 arrays, made in plain JAX before a kernel runs.

A kernel reads a few numbers for a tile, however many groups there are. Tiles begin
where their group begins, not at multiples of a tile, so that a group of n rows takes
hardly more than n / rows of them. "Hardly": Mosaic copies to swizzled memory from
multiples of 8 rows only, so the first tile of a group may hold up to 7 rows of others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ALIGNMENT = 8  # rows


class RowTiles(NamedTuple):
    """Tiles of rows, each of one group; the rows after the groups are one more group.

    An array is as long as there can be tiles at most; only the first `used` are used.
    """

    groups: jax.Array  # E for rows that are in no group
    bases: jax.Array  # first row of the tile, a multiple of 8
    firsts: jax.Array  # the group's first row in the tile, 0 to 7
    ends: jax.Array  # the group's last row in the tile and one, 1 to the tile's
    used: jax.Array  # [1], how many tiles there are


class Groups(NamedTuple):
    """Groups by falling size, so that no long one is left to the end."""

    groups: jax.Array
    bases: jax.Array  # a multiple of 8
    firsts: jax.Array  # the group's first row, from the base: 0 to 7
    ends: jax.Array  # its last row and one, from the base


def max_row_tiles(num_rows: int, num_groups: int, tile_rows: int) -> int:
    """Returns the number of tiles that suffices for any sizes of the groups."""
    # Each group, and the rows after them, has so many rows of others at most.
    others = tile_rows - 1 + ALIGNMENT - 1
    return (num_rows + (num_groups + 1) * others) // tile_rows


def row_tiles(group_sizes_E: jax.Array, num_rows: int, tile_rows: int) -> RowTiles:
    """Returns the tiles that cover every row of every group, and those after them."""
    num_groups = group_sizes_E.shape[0]
    starts, ends = _bounds(group_sizes_E, num_rows)
    starts = jnp.concatenate([starts, ends[-1:]])
    ends = jnp.concatenate([ends, jnp.full((1,), num_rows, jnp.int32)])
    bases = _aligned(starts)
    tiles_of_group = jnp.where(
        ends > starts, (ends - bases + (tile_rows - 1)) // tile_rows, 0
    )
    tiles_to_here = jnp.cumsum(tiles_of_group)
    tiles = jnp.arange(max_row_tiles(num_rows, num_groups, tile_rows), dtype=jnp.int32)
    groups = (tiles[:, None] >= tiles_to_here[None, :]).sum(axis=1, dtype=jnp.int32)
    groups = jnp.minimum(groups, num_groups)  # of those beyond `used`
    before = tiles - (tiles_to_here - tiles_of_group)[groups]
    tile_bases = bases[groups] + before * tile_rows
    return RowTiles(
        groups,
        tile_bases,
        jnp.maximum(starts[groups] - tile_bases, 0),
        jnp.minimum(ends[groups] - tile_bases, tile_rows),
        tiles_to_here[-1:],
    )


def groups_by_size(group_sizes_E: jax.Array, num_rows: int) -> Groups:
    """Returns where each group lies, the largest first."""
    starts, ends = _bounds(group_sizes_E, num_rows)
    order = jnp.argsort(starts - ends).astype(jnp.int32)
    starts, ends = starts[order], ends[order]
    bases = _aligned(starts)
    return Groups(order, bases, starts - bases, ends - bases)


def _bounds(group_sizes_E: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns first rows and ends; sizes that ask for more rows than there are, fewer.

    What a kernel does in memory follows from these, so they are never out of bounds.
    """
    sizes = jnp.maximum(group_sizes_E.astype(jnp.int32), 0)
    ends = jnp.minimum(jnp.cumsum(sizes), num_rows)
    return jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]]), ends


def _aligned(row: jax.Array) -> jax.Array:
    return row // ALIGNMENT * ALIGNMENT

# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on the rows of a step, inside a kernel: pieces, sums, stores.

A step's rows are handled in `num_pieces` pieces of float32. One of narrow rows is
[rows, piece], of a wide row [piece], of a shared one [quarters, piece]. What is one
number of a row (a mean) is [rows] or a scalar; `spread` makes it fit a piece.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.norm.tiles import WARPGROUP, Tile

Piece = Callable[[int], jax.Array]  # of a number, below num_pieces


def shape(tile: Tile, width: int) -> tuple[int, ...]:
    """Returns how a row, or a vector of its width, is laid out for the kernels."""
    if tile.is_shared:
        return tile.parts, tile.lines, width // tile.parts // tile.lines
    return (1, width) if tile.is_narrow else (width,)


def layout(tile: Tile) -> Any:
    """Returns which thread has which elements of a piece."""
    if tile.lanes == WARPGROUP:
        return plgpu.Layout.WG_STRIDED((tile.piece,), vec_size=tile.vector)
    lines = 32 // tile.lanes  # of a warp
    columns = tile.lanes * tile.vector
    if lines == 1:
        tiling = plgpu.Tiling(((4, columns), (tile.vector,)))
        dims = dict(warp_dims=(-3,), lane_dims=(-2,))
    else:
        tiling = plgpu.Tiling(((4 * lines, columns), (lines, tile.vector)))
        dims = dict(warp_dims=(-4,), lane_dims=(-2, -3))
    return plgpu.Layout.TILED(tiling, **dims, vector_dim=-1)


def zeros(tile: Tile) -> jax.Array:
    """Returns a piece of zeros."""
    wide = tile.lanes == WARPGROUP
    dims = (tile.piece,) if wide else (tile.lines, tile.piece)
    return plgpu.layout_cast(jnp.zeros(dims, jnp.float32), layout(tile))


def load(tile: Tile, rows_ref: Any, k: int) -> jax.Array:
    """Returns piece k of rows, as float32; see `view`."""
    loaded = plgpu.load(view(tile, rows_ref, k), layout=layout(tile), optimized=False)
    return loaded.astype(jnp.float32)


def store(tile: Tile, rows_ref: Any, k: int, piece: jax.Array) -> None:
    """Writes piece k of rows; see `view`."""
    view(tile, rows_ref, k)[...] = piece


def view(tile: Tile, rows_ref: Any, k: int) -> Any:
    """Returns the ref of piece k.

    Args:
      rows_ref: [rows, 1, width] of narrow rows, [width] or more of a wide one,
        [quarters, width / parts / quarters] of a shared one.
    """
    place = pl.ds(k * tile.piece, tile.piece)
    if tile.is_narrow:
        return rows_ref.at[:, 0, place]
    if tile.is_shared:
        return rows_ref.at[:, place]
    # In shared memory there is room behind a row; elsewhere the last piece overlaps
    # the one before instead, and both store the same there.
    start = min(k * tile.piece, rows_ref.shape[0] - tile.piece)
    return rows_ref.at[pl.ds(start, tile.piece)]


def load_vector(tile: Tile, vector_ref: Any, k: int) -> jax.Array:
    """Returns piece k of what is the same for all rows, such as the scale.

    Args:
      vector_ref: float32, as `arrange` made it; of a shared row, this part of it.
    """
    if not tile.is_narrow:
        ref = view(tile, vector_ref, k)
        return plgpu.load(ref, layout=layout(tile), optimized=False)
    ref = vector_ref.at[0, pl.ds(k * tile.piece, tile.piece)]
    vector = plgpu.load(ref, optimized=False)
    piece = lax.broadcast_in_dim(vector, (tile.rows, tile.piece), (1,))
    return plgpu.layout_cast(piece, layout(tile))


def arrange(tile: Tile, vector_D: jax.Array) -> jax.Array:
    """Returns a vector as `load_vector` wants it: in the shape of a row of pieces."""
    width = vector_D.shape[0]
    if tile.is_narrow or tile.is_shared:
        return vector_D.reshape(shape(tile, width))
    if tile.staged:
        return jnp.pad(vector_D, (0, tile.num_pieces * tile.piece - width))
    whole = (tile.num_pieces - 1) * tile.piece
    return jnp.concatenate([vector_D[:whole], vector_D[width - tile.piece :]])


def rearrange(tile: Tile, arranged: jax.Array, width: int) -> jax.Array:
    """Returns the vector [width] of which `arranged` is `arrange(tile, vector)`."""
    arranged = arranged.reshape(-1)
    if tile.staged:
        return arranged[:width]
    whole = (tile.num_pieces - 1) * tile.piece
    last = arranged[arranged.shape[0] - (width - whole) :]
    return jnp.concatenate([arranged[:whole], last])


def remember(tile: Tile, piece: Piece, fits: bool) -> Piece:
    """Returns a Piece that is made once and kept in registers, if it fits there."""
    if not fits:
        return piece
    kept = [piece(k) for k in range(tile.num_pieces)]
    return kept.__getitem__


def row_sums(
    tile: Tile, width: int, exchange: Callable[..., Any], *pieces: Piece
) -> Sequence[Any]:
    """Returns the sum over each row of each of the pieces.

    Args:
      exchange: adds up what the warps of a shared row have.
    """
    totals = []
    for piece in pieces:
        total = _owned(tile, width, piece, 0)
        for k in range(1, tile.num_pieces):
            total = total + _owned(tile, width, piece, k)
        totals.append(jnp.sum(total, axis=None if tile.lanes == WARPGROUP else 1))
    return exchange(*totals)


def _owned(tile: Tile, width: int, piece: Piece, k: int) -> jax.Array:
    """Returns piece k with zeros where it sticks out of the row, or overlaps."""
    surplus = tile.num_pieces * tile.piece - width
    if tile.is_shared or k < tile.num_pieces - 1 or not surplus:
        return piece(k)
    column = plgpu.broadcasted_iota(jnp.int32, (tile.piece,), 0, layout=layout(tile))
    own = column < tile.piece - surplus if tile.staged else column >= surplus
    return jnp.where(own, piece(k), 0.0)


def spread(tile: Tile, of_rows: jax.Array) -> jax.Array:
    """Returns a number of each row so that it multiplies a piece."""
    if not tile.is_narrow:
        return of_rows
    return lax.broadcast_in_dim(of_rows, (tile.rows, tile.piece), (0,))


def keep_rows(tile: Tile, piece: jax.Array, first_row: Any, num_rows: int) -> jax.Array:
    """Returns a piece with zeros for rows that are not there, whatever it held."""
    if num_rows % tile.rows == 0:  # as always if they are not narrow
        return piece
    row = plgpu.broadcasted_iota(
        jnp.int32, (tile.rows, tile.piece), 0, layout=layout(tile)
    )
    return jnp.where(row + first_row < num_rows, piece, 0.0)

# SPDX-License-Identifier: Apache-2.0
"""Masks as key ranges: query t of a row sees the keys start_BT <= s < end_BT.

Causal attention, windows, packed documents, decoding and all of them together are
ranges, so a kernel needs two integers a query and never a T x S mask. From ranges
follow, in plain JAX, the bounds of a tile: which blocks it must visit at all, and
which of these are visible to all of it, so that no mask is applied there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FAR = 2**30  # beyond every position; sums with positions stay in int32


class Bounds(NamedTuple):
    """Half-open ranges a tile: lo <= full_lo <= full_hi <= hi.

    Nothing outside [lo, hi) is visible, and all of [full_lo, full_hi) is, to each query
    or key of the tile that exists. A tile that sees nothing has lo == hi.
    """

    lo: jax.Array
    full_lo: jax.Array
    full_hi: jax.Array
    hi: jax.Array


def key_ranges(
    q_shape: tuple[int, ...],
    num_keys: int,
    *,
    causal: bool,
    segments_BT: jax.Array | None,
    positions_BT: jax.Array | None,
    window: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns start_BT and end_BT, int32, of the keys each query sees.

    A query that sees none has start == end. Arguments are those of `attention`.

    Args:
      q_shape: shape of q_BTNH.
      num_keys: S.
    """
    b, t = q_shape[:2]
    place_BT = jax.lax.broadcasted_iota(jnp.int32, (b, t), 1)
    if positions_BT is not None:
        place_BT = positions_BT.astype(jnp.int32)
    start_BT = jnp.zeros((b, t), jnp.int32)
    end_BT = jnp.full((b, t), num_keys, jnp.int32)
    if causal:
        end_BT = jnp.minimum(end_BT, place_BT + 1)
    if window:
        window = min(window, FAR)
        start_BT = jnp.maximum(start_BT, place_BT - (window - 1))
        end_BT = jnp.minimum(end_BT, place_BT + window)
    if segments_BT is not None:
        first_BT, last_BT = document_ranges(segments_BT)
        start_BT = jnp.maximum(start_BT, first_BT)
        end_BT = jnp.minimum(end_BT, last_BT)
    start_BT = jnp.minimum(start_BT, num_keys)
    return start_BT, jnp.maximum(start_BT, end_BT)


def document_ranges(segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where the document of each token starts and ends, int32 BT.

    A document is a run of equal ids; the range of padding, id 0, is empty.
    """
    t = segments_BT.shape[1]
    place_BT = jax.lax.broadcasted_iota(jnp.int32, segments_BT.shape, 1)
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)), constant_values=True)
    ends_BT = jnp.pad(changes_BT, ((0, 0), (0, 1)), constant_values=True)
    first_BT = jax.lax.cummax(jnp.where(begins_BT, place_BT, 0), axis=1)
    last_BT = jax.lax.cummin(jnp.where(ends_BT, place_BT + 1, t), axis=1, reverse=True)
    return first_BT, jnp.where(segments_BT == 0, first_BT, last_BT)


def visible_in_ranges(
    start_BT: jax.Array, end_BT: jax.Array, num_keys: int
) -> jax.Array:
    """Returns mask_BTS: true where query t sees key s."""
    key_11S = jnp.arange(num_keys, dtype=jnp.int32)[None, None]
    return (start_BT[:, :, None] <= key_11S) & (key_11S < end_BT[:, :, None])


def query_tile_bounds(
    start_BT: jax.Array, end_BT: jax.Array, num_keys: int, block_q: int
) -> Bounds:
    """Returns the keys that tiles of queries see: int32, a column per tile of a row.

    Queries beyond T, in the last tile, do not count.
    """
    t = start_BT.shape[1]
    padding = ((0, 0), (0, -t % block_q))
    shape = (start_BT.shape[0], -(-t // block_q), block_q)

    def tiles(x_BT, beyond):
        return jnp.pad(x_BT, padding, constant_values=beyond).reshape(shape)

    start_BT, end_BT = jnp.maximum(start_BT, 0), jnp.minimum(end_BT, num_keys)
    sees_BT = start_BT < end_BT
    lo = tiles(jnp.where(sees_BT, start_BT, FAR), FAR).min(-1)
    hi = tiles(jnp.where(sees_BT, end_BT, 0), 0).max(-1)
    # A query that sees nothing, start == end, leaves no key that all of its tile see.
    full_lo = tiles(start_BT, 0).max(-1)
    full_hi = tiles(jnp.where(sees_BT, end_BT, 0), FAR).min(-1)
    return _ordered(lo, full_lo, full_hi, hi)


def key_tile_bounds(
    start_BT: jax.Array, end_BT: jax.Array, num_keys: int, block_q: int, block_kv: int
) -> Bounds:
    """Returns the tiles of queries that see tiles of keys: int32, in tiles of block_q.

    [full_lo, full_hi) is the first run of tiles whose every query sees every key of
    the tile of keys. Keys beyond S, in the last tile, are seen by none.
    """
    queries = query_tile_bounds(start_BT, end_BT, num_keys, block_q)
    first = jnp.arange(-(-num_keys // block_kv), dtype=jnp.int32)[None, :, None]
    first = first * block_kv
    lo, full_lo, full_hi, hi = (x[:, None, :] for x in queries)
    seen = (lo < first + block_kv) & (hi > first)
    full = (full_lo <= first) & (full_hi >= first + block_kv)
    tile = jax.lax.broadcasted_iota(jnp.int32, seen.shape, 2)
    run_lo = jnp.where(full, tile, FAR).min(-1)
    broken = ~full & (tile >= run_lo[:, :, None])
    run_hi = jnp.where(broken, tile, tile.shape[2]).min(-1)
    return _ordered(
        jnp.where(seen, tile, FAR).min(-1),
        run_lo,
        run_hi,
        jnp.where(seen, tile + 1, 0).max(-1),
    )


def _ordered(lo, full_lo, full_hi, hi) -> Bounds:
    hi = jnp.maximum(hi, 0)
    lo = jnp.minimum(lo, hi)
    full_lo = jnp.clip(full_lo, lo, hi)
    return Bounds(lo, full_lo, jnp.clip(full_hi, full_lo, hi), hi)

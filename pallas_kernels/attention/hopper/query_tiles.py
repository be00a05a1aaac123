# SPDX-License-Identifier: Apache-2.0
"""Tiles of queries: which one a CUDA block works on, and which blocks of keys it sees.

For the kernels that loop over the keys of a query tile: forward, and the gradient dQ.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.ranges import query_tile_bounds

# Keys and values that CUDA blocks which run together share; an H200's L2 has 50 MB.
L2_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class QueryTiles:
    """The tiles of queries of a call, and the blocks of keys that each sees."""

    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    block_q: int  # queries of a tile
    block_kv: int  # keys of a block

    @property
    def num_tiles(self) -> int:
        return pl.cdiv(self.q_shape[1], self.block_q)

    @property
    def num_blocks(self) -> int:
        return self.q_shape[0] * self.q_shape[2] * self.num_tiles

    def steps(self, start_BT: jax.Array, end_BT: jax.Array) -> jax.Array:
        """Returns the bounds of each tile, [B, tiles, 4], in blocks of keys."""
        size, s = self.block_kv, self.k_shape[1]
        bounds = query_tile_bounds(start_BT, end_BT, s, self.block_q)
        lo, hi = bounds.lo // size, pl.cdiv(bounds.hi, size)
        full_lo = jnp.clip(pl.cdiv(bounds.full_lo, size), lo, hi)
        full_hi = jnp.clip(bounds.full_hi // size, full_lo, hi)
        return jnp.stack([lo, full_lo, full_hi, hi], axis=-1)

    def of_block(self, block: jax.Array) -> "QueryTile":
        """Returns what a CUDA block works on.

        Blocks start in order. The last tiles of queries, under a causal mask the
        longest, come first; the heads in flight are so few that L2 holds their keys.
        """
        (b, _, n, h), (_, s, k, _) = self.q_shape, self.k_shape
        room = max(1, L2_BYTES // (4 * s * h))
        together = max(i for i in range(1, b * k + 1) if b * k % i == 0 and i <= room)
        width = together * (n // k)
        section, block = divmod_by(block, width * self.num_tiles)
        from_last, block = divmod_by(block, width)
        pair, member = divmod_by(block, n // k)
        batch, kv_head = divmod_by(section * together + pair, k)
        head = kv_head * (n // k) + member
        return QueryTile(batch, head, kv_head, self.num_tiles - 1 - from_last)


@dataclasses.dataclass(frozen=True)
class QueryTile:
    """Indices of the tile of queries of a head that a CUDA block works on."""

    batch: jax.Array
    head: jax.Array
    kv_head: jax.Array
    q_tile: jax.Array


@dataclasses.dataclass(frozen=True)
class Steps:
    """The blocks of keys that a CUDA block visits, those that need a mask first.

    They are [lo, hi); every query sees all of [full_lo, full_hi).
    """

    lo: jax.Array
    full_lo: jax.Array
    full_hi: jax.Array
    hi: jax.Array

    @property
    def num(self) -> jax.Array:
        return self.hi - self.lo

    @property
    def num_masked(self) -> jax.Array:
        return self.num - (self.full_hi - self.full_lo)

    def block(self, step: jax.Array) -> jax.Array:
        """Returns the block of keys of a step."""
        num_before = self.full_lo - self.lo
        after, full = self.full_hi - num_before, self.full_lo - self.num_masked
        later = jnp.where(step < self.num_masked, after, full)
        return step + jnp.where(step < num_before, self.lo, later)


def divmod_by(x: jax.Array, y: int) -> tuple[jax.Array, jax.Array]:
    """Returns divmod of x, at least 0, by lax: `//` spends instructions on signs."""
    return lax.div(x, jnp.int32(y)), lax.rem(x, jnp.int32(y))

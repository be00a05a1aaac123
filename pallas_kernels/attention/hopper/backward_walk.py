# SPDX-License-Identifier: Apache-2.0
"""The loop of the dK/dV kernels over the query tiles that see one key tile.

The last warpgroup loads queries, a tile at a time, into a ring in shared memory; the
others compute.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.attention.hopper.backward_call import (
    REGISTERS,
    ROWS,
    BackwardCall,
    Inputs,
    hide,
)
from pallas_kernels.attention.hopper.query_tiles import L2_BYTES, divmod_by
from pallas_kernels.attention.ranges import key_tile_bounds
from pallas_kernels.attention.tiles import KeyGradientTile

COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a number a query, beside [keys, queries]


@dataclasses.dataclass(frozen=True)
class KeyTile:
    """Indices of the tile of keys of a head that a CUDA block works on."""

    batch: jax.Array
    kv_head: jax.Array
    tile: jax.Array


@dataclasses.dataclass(frozen=True)
class KeyTiles:
    """The tiles of keys of a call, and the tiles of queries that see each of them."""

    call: BackwardCall
    block_q: int
    block_kv: int

    @property
    def num_tiles(self) -> int:
        return pl.cdiv(self.call.k_shape[1], self.block_kv)

    @property
    def num_blocks(self) -> int:
        return self.call.k_shape[0] * self.call.k_shape[2] * self.num_tiles

    def steps(self, start_BT: jax.Array, end_BT: jax.Array) -> jax.Array:
        """Returns the bounds of each tile, [B, tiles, 4], in tiles of queries."""
        s = self.call.k_shape[1]
        bounds = key_tile_bounds(start_BT, end_BT, s, self.block_q, self.block_kv)
        return jnp.stack(bounds, axis=-1)

    def of_block(self, block: jax.Array) -> KeyTile:
        """Returns what a CUDA block works on.

        Blocks start in order. The first tiles of keys, under a causal mask the longest,
        come first; the heads in flight are so few that L2 holds their queries.
        """
        (_, t, _, h), (b, _, k, _) = self.call.q_shape, self.call.k_shape
        room = max(1, L2_BYTES // (4 * t * h * self.call.group))
        together = max(i for i in range(1, b * k + 1) if b * k % i == 0 and i <= room)
        section, block = divmod_by(block, together * self.num_tiles)
        tile, pair = divmod_by(block, together)
        batch, kv_head = divmod_by(section * together + pair, k)
        return KeyTile(batch, kv_head, tile)


@dataclasses.dataclass(frozen=True)
class Visit:
    """A step of the loop: a tile of queries of one of the heads that share the keys."""

    member: jax.Array  # head, counted among these
    tile: jax.Array
    slot: jax.Array  # of the ring that holds it
    number: jax.Array  # of the step, from 0
    warpgroup: jax.Array  # that computes


@dataclasses.dataclass(frozen=True)
class Walk:
    """What a warpgroup that computes sees."""

    tiles: KeyTiles
    tile: KeyGradientTile
    steps: tuple[jax.Array, ...]  # lo, full_lo, full_hi, hi: tiles of queries
    warpgroup: jax.Array  # that computes, or loads
    arrays: Any  # in global memory
    shared: Any  # memory and barriers

    @property
    def call(self) -> BackwardCall:
        return self.tiles.call

    @property
    def place(self) -> KeyTile:
        return _place(self.tiles)

    def queries(self, visit: Callable[[Visit, Any], Any], carry: Any) -> Any:
        """Returns carry after `carry = visit(Visit, carry)` of each tile."""
        lo, _, _, hi = self.steps

        def visit_tile(g, i, carry):
            number = g * (hi - lo) + i - lo
            slot = lax.rem(number, jnp.int32(self.tile.num_stages))
            plgpu.barrier_wait(self.shared.loaded.at[slot])
            # Addresses that depend on the warpgroup are the same in each step. The
            # barrier has them recomputed; kept, they take 30 registers too many.
            warpgroup = lax.optimization_barrier(self.warpgroup)
            carry = visit(Visit(g, i, slot, number, warpgroup), carry)
            plgpu.barrier_arrive(self.shared.consumed.at[slot])
            return carry

        def visit_head(g, carry):
            return lax.fori_loop(lo, hi, functools.partial(visit_tile, g), carry)

        plgpu.barrier_wait(self.shared.keys_loaded)
        return lax.fori_loop(0, self.call.group, visit_head, carry)

    def weights(self, visit: Visit, s: jax.Array, part: Any) -> Any:
        """Returns `call.weights` of masked s, products of a part's keys and queries."""
        _, full_lo, full_hi, _ = self.steps
        start, end = (self._across_keys(self.shared.ranges, visit, i) for i in range(2))
        first = self.first_key(part)
        s = lax.cond(
            (visit.tile < full_lo) | (visit.tile >= full_hi),
            lambda s: hide(s, first, 0, start, end),
            lambda s: s,
            s,
        )
        return self.call.weights(s, self._across_keys(self.shared.terms, visit, 0))

    def start(self, visit: Visit) -> jax.Array | mosaic.Zeros:
        """Returns what products of keys and queries start from."""
        if self.call.softcap is not None:
            return mosaic.Zeros(ROWS, self.tile.block_q)
        return self._across_keys(self.shared.terms, visit, 0)()

    def delta_term(self, visit: Visit) -> jax.Array:
        """Returns what products of values and dout start from."""
        return self._across_keys(self.shared.terms, visit, 1)()

    def first_key(self, part: jax.Array | int) -> jax.Array:
        """Returns the first of the 64 keys of a part of the tile."""
        num_parts = self.shared.k.shape[0]
        return (self.place.tile * num_parts + part) * ROWS

    def store(self, sums: jax.Array, shared: Any, array: Any, part: Any) -> None:
        """Writes the gradients of a part's keys by way of shared memory."""
        shared.at[part][...] = sums.astype(shared.dtype)
        plgpu.commit_smem()
        keys, place = pl.ds(self.first_key(part), ROWS), self.place
        target = array.at[place.batch, keys, place.kv_head]
        plgpu.copy_smem_to_gmem(shared.at[part], target)

    def _across_keys(self, ring, visit, i) -> Callable[[], jax.Array]:
        def read():
            x = plgpu.load(ring.at[visit.slot, i], layout=COLUMNS)
            return lax.broadcast_in_dim(x, (ROWS, self.tile.block_q), (1,))

        return read


def walk_kernel(
    call: BackwardCall,
    inputs: Inputs,
    start_BT: jax.Array,
    end_BT: jax.Array,
    *,
    tile: KeyGradientTile,
    compute: Callable[[Walk], None],
    name: str,
    num_parts: int,
    extra_inputs: dict[str, Any],
    extra_shared: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    """Runs a kernel over tiles of keys and returns dk_BSKH and dv_BSKH.

    Args:
      compute: what a warpgroup that computes does.
      name: of the kernel.
      num_parts: of 64 keys in a tile of them.
      extra_inputs: more of `Walk.arrays`.
      extra_shared: more of `Walk.shared`.
    """
    dtype, h = inputs.k_BSKH.dtype, call.k_shape[-1]
    tiles = KeyTiles(call, tile.block_q, num_parts * ROWS)
    # Mosaic infers from their use that TMA lays them out as wgmma reads them.
    keys = plgpu.SMEM((num_parts, ROWS, h), dtype)
    queries = plgpu.SMEM((tile.num_stages, tile.block_q, h), dtype)
    rows = tile.num_stages, 2, tile.block_q
    out = jax.ShapeDtypeStruct(call.k_shape, dtype)
    names = ("q", "k", "v", "dout", "terms", "ranges", "steps", *extra_inputs)

    def body(*refs, **shared):
        arrays = dict(zip((*names, "dk", "dv"), refs, strict=True))
        _body(tiles, tile, compute, arrays, types.SimpleNamespace(**shared))

    return mosaic.kernel(
        body,
        name=name,
        out_type=(out, out),
        scratch_types=dict(
            k=keys,
            v=keys,
            q=queries,
            dout=queries,
            terms=plgpu.SMEM(rows, jnp.float32),
            ranges=plgpu.SMEM(rows, jnp.int32),
            keys_loaded=plgpu.Barrier(num_arrivals=2 * num_parts),
            loaded=plgpu.Barrier(num_arrivals=4, num_barriers=tile.num_stages),
            consumed=plgpu.Barrier(
                num_arrivals=tile.num_warpgroups, num_barriers=tile.num_stages
            ),
            **extra_shared,
        ),
        grid=(tiles.num_blocks,),
        grid_names=("block",),
        num_threads=tile.num_warpgroups + 1,
        thread_name="warpgroup",
    )(*inputs, tiles.steps(start_BT, end_BT), *extra_inputs.values())


def _body(tiles: KeyTiles, tile: KeyGradientTile, compute, arrays, shared) -> None:
    warpgroup, arrays = lax.axis_index("warpgroup"), types.SimpleNamespace(**arrays)
    registers = REGISTERS[tile.num_warpgroups]

    def walk():
        place = _place(tiles)
        steps = tuple(arrays.steps[place.batch, place.tile, i] for i in range(4))
        return Walk(tiles, tile, steps, warpgroup, arrays, shared)

    @pl.when(warpgroup < tile.num_warpgroups)
    def _():
        plgpu.set_max_registers(registers[0], action="increase")
        compute(walk())
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == tile.num_warpgroups)
    def _():
        plgpu.set_max_registers(registers[1], action="decrease")
        _load(walk())


def _place(tiles: KeyTiles) -> KeyTile:
    """Returns what the CUDA block works on, recomputed at each call.

    Kept, it would take registers that the loops have not.
    """
    return tiles.of_block(lax.optimization_barrier(lax.axis_index("block")))


def _load(walk: Walk) -> None:
    """Copies the keys and values once, and the queries of each step into the ring."""
    arrays, shared, place = walk.arrays, walk.shared, walk.place
    for part in range(shared.k.shape[0]):
        keys = place.batch, pl.ds(walk.first_key(part), ROWS), place.kv_head
        for source, target in (arrays.k, shared.k), (arrays.v, shared.v):
            plgpu.copy_gmem_to_smem(
                source.at[keys], target.at[part], shared.keys_loaded
            )
    lo, hi = walk.steps[0], walk.steps[-1]
    stages, size = jnp.int32(walk.tile.num_stages), walk.tile.block_q

    @pl.loop(0, walk.call.group)
    def _(g):
        head = place.kv_head * walk.call.group + g

        @pl.loop(lo, hi)
        def _(i):
            number = g * (hi - lo) + i - lo
            slot = lax.rem(number, stages)

            @pl.when(number >= stages)
            def _():
                plgpu.barrier_wait(shared.consumed.at[slot])

            rows = pl.ds(i * size, size)
            for source, ring in (
                (arrays.q.at[place.batch, rows, head], shared.q),
                (arrays.dout.at[place.batch, rows, head], shared.dout),
                (arrays.terms.at[place.batch, head, :, rows], shared.terms),
                (arrays.ranges.at[place.batch, :, rows], shared.ranges),
            ):
                plgpu.copy_gmem_to_smem(source, ring.at[slot], shared.loaded.at[slot])

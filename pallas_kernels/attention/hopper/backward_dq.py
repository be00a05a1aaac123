# SPDX-License-Identifier: Apache-2.0
"""Gradients of queries: a kernel over tiles of queries, for Hopper.

A CUDA block takes a tile of queries, 64 of them a warpgroup, and loops over the keys
they see, which the last warpgroup loads into rings in shared memory.
"""

import functools
import types
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
    zeros,
)
from pallas_kernels.attention.hopper.query_tiles import QueryTile, QueryTiles
from pallas_kernels.attention.tiles import QueryGradientTile

LANES = plgpu.Layout.WGMMA.reduce(1)  # a number a query, beside [queries, keys]


def backward_dq(
    call: BackwardCall,
    inputs: Inputs,
    start_BT: jax.Array,
    end_BT: jax.Array,
    *,
    tile: QueryGradientTile,
) -> jax.Array:
    """Returns dq_BTNH."""
    dtype, h = inputs.q_BTNH.dtype, call.q_shape[-1]
    tiles = _tiles(call, tile)
    queries = plgpu.SMEM((tile.num_warpgroups, ROWS, h), dtype)
    names = ("q", "k", "v", "dout", "terms", "ranges", "steps", "dq")

    def body(*refs, **shared):
        arrays = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
        _body(call, tile, arrays, types.SimpleNamespace(**shared))

    return mosaic.kernel(
        body,
        name="attention_dq",
        out_type=jax.ShapeDtypeStruct(call.q_shape, dtype),
        scratch_types=dict(
            # Mosaic infers from their use that TMA lays them out as wgmma reads them.
            q=queries,
            dout=queries,
            q_loaded=plgpu.Barrier(num_arrivals=2 * tile.num_warpgroups),
            **_ring("k", tile, tile.num_stages, h, dtype),
            **_ring("v", tile, tile.num_value_stages, h, dtype),
        ),
        grid=(tiles.num_blocks,),
        grid_names=("block",),
        num_threads=tile.num_warpgroups + 1,
        thread_name="warpgroup",
    )(*inputs, tiles.steps(start_BT, end_BT))


def _tiles(call: BackwardCall, tile: QueryGradientTile) -> QueryTiles:
    block_q = tile.num_warpgroups * ROWS
    return QueryTiles(call.q_shape, call.k_shape, block_q, tile.block_kv)


def _ring(name: str, tile: QueryGradientTile, stages: int, h: int, dtype: Any) -> dict:
    return {
        name: plgpu.SMEM((stages, tile.block_kv, h), dtype),
        f"{name}_loaded": plgpu.Barrier(num_barriers=stages),
        f"{name}_consumed": plgpu.Barrier(
            num_arrivals=tile.num_warpgroups, num_barriers=stages
        ),
    }


def _body(
    call: BackwardCall, tile: QueryGradientTile, arrays: Any, shared: Any
) -> None:
    warpgroup = lax.axis_index("warpgroup")
    registers = REGISTERS[tile.num_warpgroups]

    @pl.when(warpgroup < tile.num_warpgroups)
    def _():
        plgpu.set_max_registers(registers[0], action="increase")
        _compute(call, tile, arrays, shared, warpgroup)

    @pl.when(warpgroup == tile.num_warpgroups)
    def _():
        plgpu.set_max_registers(registers[1], action="decrease")
        _load(call, tile, arrays, shared)


def _place(call: BackwardCall, tile: QueryGradientTile) -> QueryTile:
    """Returns what the CUDA block works on, recomputed at each call.

    Kept, it would take registers that the loops have not.
    """
    return _tiles(call, tile).of_block(
        lax.optimization_barrier(lax.axis_index("block"))
    )


def _steps(arrays: Any, place: QueryTile) -> tuple[jax.Array, ...]:
    return tuple(arrays.steps[place.batch, place.q_tile, i] for i in range(4))


def _load(call: BackwardCall, tile: QueryGradientTile, arrays: Any, shared: Any):
    place = _place(call, tile)
    lo, _, _, hi = _steps(arrays, place)
    for part in range(tile.num_warpgroups):
        rows = pl.ds((place.q_tile * tile.num_warpgroups + part) * ROWS, ROWS)
        for source, target in (arrays.q, shared.q), (arrays.dout, shared.dout):
            source = source.at[place.batch, rows, place.head]
            plgpu.copy_gmem_to_smem(source, target.at[part], shared.q_loaded)

    @pl.loop(lo, hi)
    def visit(i):
        keys = place.batch, pl.ds(i * tile.block_kv, tile.block_kv), place.kv_head
        for source, ring, loaded, consumed in (
            (arrays.k, shared.k, shared.k_loaded, shared.k_consumed),
            (arrays.v, shared.v, shared.v_loaded, shared.v_consumed),
        ):
            stages = jnp.int32(ring.shape[0])
            slot = lax.rem(i - lo, stages)

            @pl.when(i - lo >= stages)
            def wait(slot=slot, consumed=consumed):
                plgpu.barrier_wait(consumed.at[slot])

            plgpu.copy_gmem_to_smem(source.at[keys], ring.at[slot], loaded.at[slot])


def _compute(call: BackwardCall, tile, arrays, shared, warpgroup) -> None:
    h, place = call.q_shape[-1], _place(call, tile)
    steps = _steps(arrays, place)
    part = place.q_tile * tile.num_warpgroups + warpgroup
    rows = pl.ds(part * ROWS, ROWS)

    def across(array, *index):
        x = plgpu.load(array.at[*index, rows], layout=LANES, optimized=False)
        return lambda: lax.broadcast_in_dim(x, (ROWS, tile.block_kv), (0,))

    terms = [across(arrays.terms, place.batch, place.head, i) for i in range(2)]
    ranges = [across(arrays.ranges, place.batch, i) for i in range(2)]
    plgpu.barrier_wait(shared.q_loaded)
    add_keys = functools.partial(
        _add_keys, call, tile, shared, warpgroup, steps, terms, ranges
    )
    dq = lax.fori_loop(0, steps[-1] - steps[0], add_keys, zeros(h))
    out = shared.q.at[warpgroup]
    out[...] = (dq * call.scale).astype(out.dtype)
    plgpu.commit_smem()
    place, warpgroup = _place(call, tile), lax.optimization_barrier(warpgroup)
    rows = pl.ds((place.q_tile * tile.num_warpgroups + warpgroup) * ROWS, ROWS)
    plgpu.copy_smem_to_gmem(out, arrays.dq.at[place.batch, rows, place.head])
    plgpu.wait_smem_to_gmem(0)


def _add_keys(call, tile, shared, warpgroup, steps, terms, ranges, step, dq):
    """Adds what comes by way of a block of keys."""
    lo, full_lo, full_hi, _ = steps
    lse_term, delta_term = terms
    slot = lax.rem(step, jnp.int32(tile.num_stages))
    v_slot = lax.rem(step, jnp.int32(tile.num_value_stages))
    # Has addresses recomputed in each step, not kept in registers.
    warpgroup = lax.optimization_barrier(warpgroup)
    plgpu.barrier_wait(shared.k_loaded.at[slot])
    plgpu.barrier_wait(shared.v_loaded.at[v_slot])
    k, v = shared.k.at[slot], shared.v.at[v_slot]

    def multiply(s, dp):
        mosaic.wgmma(s, shared.q.at[warpgroup], k.transpose((1, 0)))
        mosaic.wgmma(dp, shared.dout.at[warpgroup], v.transpose((1, 0)))

    capped = call.softcap is not None
    start = mosaic.Zeros(ROWS, tile.block_kv) if capped else lse_term()
    s, dp = mosaic.accumulate(multiply, start, delta_term())
    plgpu.barrier_arrive(shared.v_consumed.at[v_slot])
    s = lax.cond(
        (step < full_lo - lo) | (step >= full_hi - lo),
        lambda s: hide(s, (lo + step) * tile.block_kv, 1, *ranges),
        lambda s: s,
        s,
    )
    _, slope = call.weights(s, lse_term)
    ds = (slope * dp).astype(shared.k.dtype)
    dq = mosaic.accumulate(lambda dq: mosaic.wgmma(dq, ds, k), dq)
    plgpu.barrier_arrive(shared.k_consumed.at[slot])
    return dq

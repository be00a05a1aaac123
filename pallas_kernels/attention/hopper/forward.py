# SPDX-License-Identifier: Apache-2.0
"""The forward kernel for Hopper: two warpgroups compute, a third loads.

A CUDA block takes one head and two tiles of queries, one for each warpgroup that
computes. The third copies blocks of keys and values into rings of shared memory.
A barrier makes the two take turns: while one keeps the tensor cores busy, the other
computes exponentials.

Source: Dao, "FlashAttention-2" (arXiv:2307.08691), the loop over keys; Shah et al.,
"FlashAttention-3" (arXiv:2407.08608), the warpgroups and their turns.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.attention.hopper.query_tiles import QueryTile, QueryTiles, Steps
from pallas_kernels.attention.tiles import ForwardTile

LOG2E = math.log2(math.e)
# The greatest logit of a query that has seen no key. Finite: a masked logit, -inf,
# minus it is no NaN.
LOWEST = -1e30
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a number a query, beside the accumulators


def forward_kernel(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    softcap: float | None,
    scale: float,
    tile: ForwardTile,
) -> tuple[jax.Array, jax.Array]:
    """Returns attention of each query to the keys start_BT <= s < end_BT.

    Args:
      q_BTNH: bfloat16 or float16, as k and v; H is 64, 128 or 256, N a multiple of K.
      start_BT: int32; T and S need not be alike, nor multiples of a block.
      sinks_N: logit, for each head, of a key that has no value; None is none.
      softcap: c * tanh(logits / c); None is off.
      scale: multiplies the logits; positive.

    Returns:
      out_BTNH, dtype of q, 0 where a query sees no key; and lse_BNT, float32, the log
      of the sum of exp(logits), sink included, -inf where there is neither.
    """
    b, t, n, h = q_BTNH.shape
    tiles = QueryTiles(q_BTNH.shape, k_BSKH.shape, tile.queries, tile.block_kv)
    # TMA copies rows of whole 16 bytes, so whole tiles of lse are written.
    padded_t = tiles.num_tiles * tile.queries
    padding = ((0, 0), (0, padded_t - t))
    if sinks_N is None:
        sinks_N = jnp.full(n, -jnp.inf, jnp.float32)
    out_BTNH, lse_BNT = mosaic.kernel(
        functools.partial(_body, _Call(tiles, tile, scale, softcap)),
        name="attention_forward",
        out_type=(
            jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
            jax.ShapeDtypeStruct((b, n, padded_t), jnp.float32),
        ),
        scratch_types=_scratch(h, q_BTNH.dtype, tile),
        grid=(tiles.num_blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
    )(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        jnp.pad(start_BT, padding),
        jnp.pad(end_BT, padding),
        tiles.steps(start_BT, end_BT),
        sinks_N.astype(jnp.float32),
    )
    return out_BTNH, lse_BNT[:, :, :t]


def tanh(x: jax.Array) -> jax.Array:
    """Returns tanh(x) to 1e-6, for a kernel.

    The tensor cores' companion, tanh.approx, is right to 5e-4 only: with a soft cap of
    50 that moves a logit by 0.02, more than bfloat16 weights lose. 1 / y is rsqrt(y)**2
    because a division is no single instruction.
    """
    root = lax.rsqrt(1.0 + jnp.exp2(x * (2 * LOG2E)))
    return 1.0 - 2.0 * (root * root)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is known of a call when it is traced."""

    tiles: QueryTiles
    tile: ForwardTile
    scale: float
    softcap: float | None

    @property
    def to_log2(self) -> float:
        """What makes products q k, or their tanh, logits to the base 2."""
        return LOG2E * (self.scale if self.softcap is None else self.softcap)


@dataclasses.dataclass(frozen=True)
class _Memory:
    """What a kernel sees: arrays in global memory, then what is shared."""

    q: Any
    k: Any
    v: Any
    start: Any
    end: Any
    steps: Any
    sinks: Any
    out: Any
    lse: Any
    q_smem: Any
    k_smem: Any
    v_smem: Any
    q_loaded: Any
    k_loaded: Any
    v_loaded: Any
    k_consumed: Any
    v_consumed: Any
    turn: Any


def _scratch(h: int, dtype: Any, tile: ForwardTile) -> dict[str, Any]:
    # Mosaic infers from their use that TMA lays them out as wgmma reads them.
    ring = plgpu.SMEM((tile.num_stages, tile.block_kv, h), dtype)
    loaded = plgpu.Barrier(num_barriers=tile.num_stages)
    consumed = plgpu.Barrier(num_arrivals=2, num_barriers=tile.num_stages)
    return dict(
        q_smem=plgpu.SMEM((2, tile.block_q, h), dtype),  # then the output
        k_smem=ring,
        v_smem=ring,
        q_loaded=plgpu.Barrier(num_barriers=2),
        k_loaded=loaded,
        v_loaded=loaded,
        k_consumed=consumed,
        v_consumed=consumed,
        turn=plgpu.Barrier(num_arrivals=2),
    )


def _body(call: _Call, *refs: Any, **shared: Any) -> None:
    memory = _Memory(*refs, **shared)
    place = call.tiles.of_block(lax.axis_index("block"))
    steps = Steps(*(memory.steps[place.batch, place.q_tile, i] for i in range(4)))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _compute(call, memory, place, steps, warpgroup)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _load(call, memory, place, steps)


def _load(call: _Call, memory: _Memory, place: QueryTile, steps: Steps) -> None:
    """Copies the keys and values of each step into the rings."""
    size, stages = call.tile.block_kv, call.tile.num_stages

    @pl.loop(0, steps.num)
    def _(step):
        slot = lax.rem(step, jnp.int32(stages))
        keys = pl.ds(steps.block(step) * size, size)
        for source, ring, loaded, consumed in (
            (memory.k, memory.k_smem, memory.k_loaded, memory.k_consumed),
            (memory.v, memory.v_smem, memory.v_loaded, memory.v_consumed),
        ):

            @pl.when(step >= stages)
            def _(consumed=consumed):
                plgpu.barrier_wait(consumed.at[slot])

            source = source.at[place.batch, keys, place.kv_head]
            plgpu.copy_gmem_to_smem(source, ring.at[slot], loaded.at[slot])


def _compute(call, memory, place, steps, warpgroup) -> None:
    """Attends from one tile of queries."""
    block_q = call.tile.block_q
    rows = pl.ds((place.q_tile * 2 + warpgroup) * block_q, block_q)
    q_smem, q_loaded = memory.q_smem.at[warpgroup], memory.q_loaded.at[warpgroup]
    queries = memory.q.at[place.batch, rows, place.head]
    plgpu.copy_gmem_to_smem(queries, q_smem, q_loaded)
    start, end = (
        plgpu.load(x.at[place.batch, rows], layout=ROWS, optimized=False)
        for x in (memory.start, memory.end)
    )
    # A sink is a key that was seen before all others and has no value.
    sink = memory.sinks[place.head] * LOG2E
    top = jnp.maximum(sink, LOWEST)
    total = _rows(jnp.exp2(sink - top), block_q)
    acc = jnp.zeros((block_q, call.tiles.q_shape[-1]), jnp.float32)
    carry = plgpu.layout_cast(acc, plgpu.Layout.WGMMA), _rows(top, block_q), total
    plgpu.barrier_wait(q_loaded)
    pl.when(warpgroup == 1)(lambda: _next_turn(memory))
    add_keys = functools.partial(_add_keys, call, memory, q_smem, steps, (start, end))
    carry = lax.fori_loop(
        0, steps.num_masked, functools.partial(add_keys, masked=True), carry
    )
    acc, top, total = lax.fori_loop(
        steps.num_masked, steps.num, functools.partial(add_keys, masked=False), carry
    )
    pl.when(warpgroup == 0)(lambda: _next_turn(memory))
    seen = total > 0
    out = acc * _across(jnp.where(seen, 1 / total, 0.0), acc)
    q_smem[...] = out.astype(q_smem.dtype)
    lse = jnp.where(seen, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
    memory.lse[place.batch, place.head, rows] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, memory.out.at[place.batch, rows, place.head])
    plgpu.wait_smem_to_gmem(0)


def _add_keys(call, memory, q_smem, steps, visible, step, carry, *, masked):
    """Adds a block of keys to what a tile of queries has seen."""
    acc, top, total = carry
    stages = jnp.int32(call.tile.num_stages)
    slot, next_slot = lax.rem(step, stages), lax.rem(step + 1, stages)

    def multiply_keys(products):
        mosaic.wgmma(products, q_smem, memory.k_smem.at[slot].transpose((1, 0)))
        _next_turn(memory)

    pl.when(step == 0)(lambda: plgpu.barrier_wait(memory.k_loaded.at[0]))
    logits = mosaic.accumulate(
        multiply_keys, mosaic.Zeros(call.tile.block_q, call.tile.block_kv)
    )
    plgpu.barrier_arrive(memory.k_consumed.at[slot])
    if call.softcap is not None:
        logits = tanh(logits * (call.scale / call.softcap))
    if masked:
        first = steps.block(step) * call.tile.block_kv
        logits = _masked(logits, *(bound - first for bound in visible))
    # `top` has the base 2, so that an exponential takes one multiply-add and exp2.
    new_top = jnp.maximum(top, logits.max(axis=1) * call.to_log2)
    weights = jnp.exp2(logits * call.to_log2 - _across(new_top, logits))
    shrink = jnp.exp2(top - new_top)
    total = total * shrink + weights.sum(axis=1)
    acc = acc * _across(shrink, acc)
    weights = weights.astype(q_smem.dtype)
    acc, new_top, total, weights = lax.optimization_barrier(
        (acc, new_top, total, weights)
    )
    plgpu.barrier_arrive(memory.turn)
    plgpu.barrier_wait(memory.v_loaded.at[slot])
    plgpu.barrier_wait(memory.turn)

    def multiply_values(acc):
        mosaic.wgmma(acc, weights, memory.v_smem.at[slot])

        @pl.when(step + 1 < steps.num)
        def _():
            plgpu.barrier_wait(memory.k_loaded.at[next_slot])

    acc = mosaic.accumulate(multiply_values, acc)
    plgpu.barrier_arrive(memory.v_consumed.at[slot])
    return acc, new_top, total


def _masked(logits: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    column = plgpu.broadcasted_iota(
        jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA
    )
    seen = (column >= _across(start, column)) & (column < _across(end, column))
    return jnp.where(seen, logits, -jnp.inf)


def _next_turn(memory: _Memory) -> None:
    plgpu.barrier_arrive(memory.turn)
    plgpu.barrier_wait(memory.turn)


def _rows(x: jax.Array, block_q: int) -> jax.Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (block_q,), ()), ROWS)


def _across(x: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(x, like.shape, (0,))

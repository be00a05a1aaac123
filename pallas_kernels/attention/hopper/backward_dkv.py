# SPDX-License-Identifier: Apache-2.0
"""Gradients of keys and values: a kernel over tiles of keys, for Hopper.

A CUDA block loops over the query heads that share its keys and the tiles of queries
that see them. The sums stay in registers, so there are no atomics, and the result is
deterministic. Products are taken transposed, [keys, queries]: then P and dS are left
operands of the next product as they lie in registers.

The sums of 64 keys take H registers of a thread. Up to H = 128 each warpgroup takes 64
keys of its own. At H = 256 two share the same 64 keys: one makes P and dV, and hands P
to the other, which makes dS and dK.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.attention.hopper.backward_call import (
    ROWS,
    BackwardCall,
    Inputs,
    zeros,
)
from pallas_kernels.attention.hopper.backward_walk import Visit, Walk, walk_kernel
from pallas_kernels.attention.tiles import KeyGradientTile

MAX_OWN_WIDTH = 128  # of heads, where a warpgroup has keys of its own


def backward_dkv(
    call: BackwardCall,
    inputs: Inputs,
    start_BT: jax.Array,
    end_BT: jax.Array,
    *,
    tile: KeyGradientTile,
) -> tuple[jax.Array, jax.Array]:
    """Returns dk_BSKH and dv_BSKH."""
    own = call.k_shape[-1] <= MAX_OWN_WIDTH
    weights = (tile.num_stages, ROWS, tile.block_q)
    handed_over = dict(
        p=plgpu.SMEM(weights, inputs.k_BSKH.dtype),
        p_stored=plgpu.Barrier(num_barriers=tile.num_stages),
    )
    return walk_kernel(
        call,
        inputs,
        start_BT,
        end_BT,
        tile=tile,
        compute=_own_keys if own else _shared_keys,
        name="attention_dkv",
        num_parts=tile.num_warpgroups if own else 1,
        extra_inputs={},
        extra_shared={} if own else handed_over,
    )


def _own_keys(walk: Walk) -> None:
    def add(visit, carry):
        q, dout = walk.shared.q.at[visit.slot], walk.shared.dout.at[visit.slot]
        p, ds = own_scores(walk, visit)

        def multiply(dk, dv):
            mosaic.wgmma(dv, p, dout)
            mosaic.wgmma(dk, ds, q)

        return mosaic.accumulate(multiply, *carry)

    h = walk.call.k_shape[-1]
    store_both(walk, *walk.queries(add, (zeros(h), zeros(h))))


def own_scores(walk: Walk, visit: Visit) -> tuple[jax.Array, ...]:
    """Returns P and dS of a warpgroup's own 64 keys, [keys, queries]."""
    shared = walk.shared

    def multiply(s, dp):
        q, dout = shared.q.at[visit.slot], shared.dout.at[visit.slot]
        mosaic.wgmma(s, shared.k.at[visit.warpgroup], q.transpose((1, 0)))
        mosaic.wgmma(dp, shared.v.at[visit.warpgroup], dout.transpose((1, 0)))

    s, dp = mosaic.accumulate(multiply, walk.start(visit), walk.delta_term(visit))
    p, slope = walk.weights(visit, s, visit.warpgroup)
    return p.astype(shared.q.dtype), (slope * dp).astype(shared.q.dtype)


def store_both(walk: Walk, dk: jax.Array, dv: jax.Array) -> None:
    """Writes the gradients of a warpgroup's own keys, over the keys and values."""
    part = lax.optimization_barrier(walk.warpgroup)  # as in `Walk.queries`
    walk.store(dk * walk.call.scale, walk.shared.k, walk.arrays.dk, part)
    walk.store(dv, walk.shared.v, walk.arrays.dv, part)


def _shared_keys(walk: Walk) -> None:
    shared, h = walk.shared, walk.call.k_shape[-1]

    def add_values(visit, dv):
        q, dout = shared.q.at[visit.slot], shared.dout.at[visit.slot]
        s = mosaic.accumulate(
            lambda s: mosaic.wgmma(s, shared.k.at[0], q.transpose((1, 0))),
            walk.start(visit),
        )
        p, slope = walk.weights(visit, s, 0)
        # The loader fills this slot again, and lets this warpgroup come back to it,
        # only after the other has read P.
        shared.p.at[visit.slot][...] = slope.astype(dout.dtype)
        plgpu.barrier_arrive(shared.p_stored.at[visit.slot])
        p = p.astype(dout.dtype)
        return mosaic.accumulate(lambda dv: mosaic.wgmma(dv, p, dout), dv)

    def add_keys(visit, dk):
        q, dout = shared.q.at[visit.slot], shared.dout.at[visit.slot]
        dp = mosaic.accumulate(
            lambda dp: mosaic.wgmma(dp, shared.v.at[0], dout.transpose((1, 0))),
            walk.delta_term(visit),
        )
        plgpu.barrier_wait(shared.p_stored.at[visit.slot])
        slope = plgpu.load(shared.p.at[visit.slot], layout=plgpu.Layout.WGMMA)
        ds = (slope.astype(jnp.float32) * dp).astype(q.dtype)
        return mosaic.accumulate(lambda dk: mosaic.wgmma(dk, ds, q), dk)

    # Each writes over what it alone has read.
    @pl.when(walk.warpgroup == 0)
    def _():
        dv = walk.queries(add_values, zeros(h))
        walk.store(dv, shared.k, walk.arrays.dv, 0)

    @pl.when(walk.warpgroup == 1)
    def _():
        dk = walk.queries(add_keys, zeros(h)) * walk.call.scale
        walk.store(dk, shared.v, walk.arrays.dk, 0)

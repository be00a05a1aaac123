# SPDX-License-Identifier: Apache-2.0
"""Gradients of keys and values: a kernel over tiles of keys, for Hopper.

A CUDA block walks over the query heads that share its keys and the tiles of queries
that see them. The sums stay in registers, so there are no atomics, and the bits are the
same each time. Products are taken transposed, [keys, queries]: then P and dS are left
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
from pallas_kernels.attention.hopper.backward_plan import (
    ROWS,
    BackwardPlan,
    Inputs,
    zeros,
)
from pallas_kernels.attention.hopper.backward_walk import Step, Walk, walk_kernel
from pallas_kernels.attention.tiles import KeyGradientTile

MAX_OWN_WIDTH = 128  # of heads, where a warpgroup has keys of its own


def backward_dkv(
    plan: BackwardPlan,
    inputs: Inputs,
    start_BT: jax.Array,
    end_BT: jax.Array,
    *,
    tile: KeyGradientTile,
) -> tuple[jax.Array, jax.Array]:
    """Returns dk_BSKH and dv_BSKH."""
    own = plan.k_shape[-1] <= MAX_OWN_WIDTH
    weights = (tile.num_stages, ROWS, tile.block_q)
    handed_over = dict(
        p=plgpu.SMEM(weights, inputs.k_BSKH.dtype),
        p_stored=plgpu.Barrier(num_barriers=tile.num_stages),
    )
    return walk_kernel(
        *(plan, inputs, start_BT, end_BT),
        tile=tile,
        compute=_own_keys if own else _shared_keys,
        name="attention_dkv",
        num_parts=tile.num_warpgroups if own else 1,
        extra_inputs={},
        extra_shared={} if own else handed_over,
    )


def _own_keys(walk: Walk) -> None:
    def attend(step, carry):
        q, dout = walk.shared.q.at[step.slot], walk.shared.dout.at[step.slot]
        p, ds = own_scores(walk, step)

        def multiply(dk, dv):
            mosaic.wgmma(dv, p, dout)
            mosaic.wgmma(dk, ds, q)

        return mosaic.accumulate(multiply, *carry)

    h = walk.plan.k_shape[-1]
    store_both(walk, *walk.queries(attend, (zeros(h), zeros(h))))


def own_scores(walk: Walk, step: Step) -> tuple[jax.Array, ...]:
    """Returns P and dS of a warpgroup's own 64 keys, [keys, queries]."""
    shared = walk.shared

    def multiply(s, dp):
        q, dout = shared.q.at[step.slot], shared.dout.at[step.slot]
        mosaic.wgmma(s, shared.k.at[step.warpgroup], q.transpose((1, 0)))
        mosaic.wgmma(dp, shared.v.at[step.warpgroup], dout.transpose((1, 0)))

    s, dp = mosaic.accumulate(multiply, walk.start(step), walk.delta_term(step))
    p, slope = walk.weights(step, s, step.warpgroup)
    return p.astype(shared.q.dtype), (slope * dp).astype(shared.q.dtype)


def store_both(walk: Walk, dk: jax.Array, dv: jax.Array) -> None:
    """Writes the gradients of a warpgroup's own keys, over the keys and values."""
    part = lax.optimization_barrier(walk.warpgroup)  # as in `Walk.queries`
    walk.store(dk * walk.plan.scale, walk.shared.k, walk.arrays.dk, part)
    walk.store(dv, walk.shared.v, walk.arrays.dv, part)


def _shared_keys(walk: Walk) -> None:
    shared, h = walk.shared, walk.plan.k_shape[-1]

    def add_values(step, dv):
        q, dout = shared.q.at[step.slot], shared.dout.at[step.slot]
        s = mosaic.accumulate(
            lambda s: mosaic.wgmma(s, shared.k.at[0], q.transpose((1, 0))),
            walk.start(step),
        )
        p, slope = walk.weights(step, s, 0)
        # The loader fills this slot again, and lets this warpgroup come back to it,
        # only after the other has read P.
        shared.p.at[step.slot][...] = slope.astype(dout.dtype)
        plgpu.barrier_arrive(shared.p_stored.at[step.slot])
        p = p.astype(dout.dtype)
        return mosaic.accumulate(lambda dv: mosaic.wgmma(dv, p, dout), dv)

    def add_keys(step, dk):
        q, dout = shared.q.at[step.slot], shared.dout.at[step.slot]
        dp = mosaic.accumulate(
            lambda dp: mosaic.wgmma(dp, shared.v.at[0], dout.transpose((1, 0))),
            walk.delta_term(step),
        )
        plgpu.barrier_wait(shared.p_stored.at[step.slot])
        slope = plgpu.load(shared.p.at[step.slot], layout=plgpu.Layout.WGMMA)
        ds = (slope.astype(jnp.float32) * dp).astype(q.dtype)
        return mosaic.accumulate(lambda dk: mosaic.wgmma(dk, ds, q), dk)

    # Each writes over what it alone has read.
    @pl.when(walk.warpgroup == 0)
    def _():
        dv = walk.queries(add_values, zeros(h))
        walk.store(dv, shared.k, walk.arrays.dv, 0)

    @pl.when(walk.warpgroup == 1)
    def _():
        dk = walk.queries(add_keys, zeros(h)) * walk.plan.scale
        walk.store(dk, shared.v, walk.arrays.dk, 0)

# SPDX-License-Identifier: Apache-2.0
"""The fast backward pass for Hopper: five products, in one kernel over tiles of keys.

Beside dK and dV, which stay in registers, each step makes what its keys add to dQ: the
warpgroups put their dS together in shared memory, each makes a part of dQ, and TMA adds
it in float32 to global memory. The order of these sums varies, and with it their last
bits. The deterministic pass needs seven products and has no such sums.

Source: Shah et al., "FlashAttention-3" (arXiv:2407.08608), section 3.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.attention.hopper.backward_call import ROWS, BackwardCall, zeros
from pallas_kernels.attention.hopper.backward_dkv import own_scores, store_both
from pallas_kernels.attention.hopper.backward_walk import Visit, Walk, walk_kernel
from pallas_kernels.attention.tiles import KeyGradientTile


def backward_fused(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    out_BTNH: jax.Array,
    lse_BNT: jax.Array,
    dout_BTNH: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    *,
    softcap: float | None,
    scale: float,
    tile: KeyGradientTile,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq_BTNH, dk_BSKH and dv_BSKH, the first not deterministic.

    The arguments are those of `passes.backward_split`, but H is 64 or 128.

    Raises:
      ValueError: the tile does not give each warpgroup one part of dQ.
    """
    (b, t, n, h), dtype = q_BTNH.shape, q_BTNH.dtype
    call = BackwardCall(q_BTNH.shape, k_BSKH.shape, scale, softcap)
    inputs = call.inputs(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        out_BTNH,
        lse_BNT,
        dout_BTNH,
        start_BT,
        end_BT,
        multiple=tile.block_q,
    )
    num = tile.num_warpgroups
    if tile.block_q * h != num * ROWS * ROWS:
        raise ValueError(
            f"backward_fused got block_q={tile.block_q} and num_warpgroups={num} for "
            f"heads of {h}: a step must have one part of dQ for each warpgroup, so "
            f"block_q must be {num * ROWS * ROWS // h}."
        )
    # TMA adds whole tiles.
    dq_sum = jax.new_ref(jnp.zeros((b, t + -t % tile.block_q, n, h), jnp.float32))
    dk_BSKH, dv_BSKH = walk_kernel(
        call,
        inputs,
        start_BT,
        end_BT,
        tile=tile,
        compute=_compute,
        name="attention_backward_fused",
        num_parts=num,
        extra_inputs=dict(dq=dq_sum),
        extra_shared=dict(
            # Two: a warpgroup that is a step ahead has its own.
            ds=plgpu.SMEM((2, num, tile.block_q // ROWS, ROWS, ROWS), dtype),
            ds_stored=plgpu.Barrier(num_arrivals=num),
            dq_part=plgpu.SMEM((num, ROWS, ROWS), jnp.float32),
        ),
    )
    dq_BTNH = dq_sum[...][:, :t] * scale
    return dq_BTNH.astype(dtype), dk_BSKH, dv_BSKH


def _compute(walk: Walk) -> None:
    h = walk.call.k_shape[-1]

    def add(visit, carry):
        shared, ds_all = walk.shared, walk.shared.ds.at[lax.rem(visit.number, 2)]
        q, dout = shared.q.at[visit.slot], shared.dout.at[visit.slot]
        p, ds = own_scores(walk, visit)
        for i in range(walk.tile.block_q // ROWS):
            ds_all.at[visit.warpgroup, i][...] = ds[:, i * ROWS : (i + 1) * ROWS]
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.ds_stored)
        row, column = _part(walk, visit.warpgroup)

        def multiply(dk, dv, dq):
            mosaic.wgmma(dv, p, dout)
            mosaic.wgmma(dk, ds, q)
            plgpu.barrier_wait(shared.ds_stored)
            for i in range(walk.tile.num_warpgroups):
                keys = shared.k.at[i, :, pl.ds(column, ROWS)]
                mosaic.wgmma(dq, ds_all.at[i, row].transpose((1, 0)), keys)

        *carry, dq = mosaic.accumulate(multiply, *carry, mosaic.Zeros(ROWS, ROWS))
        _add_to_dq(walk, visit, dq)
        return tuple(carry)

    dk, dv = walk.queries(add, (zeros(h), zeros(h)))
    # The others have read these keys too.
    plgpu.barrier_arrive(walk.shared.ds_stored)
    plgpu.barrier_wait(walk.shared.ds_stored)
    store_both(walk, dk, dv)


def _add_to_dq(walk: Walk, visit: Visit, dq: jax.Array) -> None:
    """Adds a warpgroup's part of a step's dQ to the sum."""
    shared = walk.shared.dq_part.at[visit.warpgroup]
    row, column = _part(walk, visit.warpgroup)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    shared[...] = dq
    plgpu.commit_smem()
    rows = pl.ds(visit.tile * walk.tile.block_q + row * ROWS, ROWS)
    columns = pl.ds(column, ROWS)
    place = walk.place
    head = place.kv_head * walk.call.group + visit.member
    total = walk.arrays.dq.at[place.batch, rows, head, columns]
    mosaic.add_to_global(shared, total)


def _part(walk: Walk, warpgroup: jax.Array) -> tuple[Any, Any]:
    """Returns which 64 rows, and from which column, are a warpgroup's part of dQ."""
    if walk.call.k_shape[-1] == ROWS:
        return warpgroup, 0
    return 0, warpgroup * ROWS

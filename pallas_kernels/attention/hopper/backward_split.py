# SPDX-License-Identifier: Apache-2.0
"""The backward pass for Hopper whose gradients are the same bits each time.

Two kernels: one goes over tiles of queries and sums dQ, the other over tiles of keys
and sums dK and dV. Both make the products q k and dout v: seven products, where
`backward_fused` needs five.
"""

import math

import jax

from pallas_kernels.attention.hopper.backward_dkv import backward_dkv
from pallas_kernels.attention.hopper.backward_dq import backward_dq
from pallas_kernels.attention.hopper.backward_plan import ROWS, BackwardPlan
from pallas_kernels.attention.tiles import BackwardTile


def backward(
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
    tile: BackwardTile,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq_BTNH, dk_BSKH and dv_BSKH of what `forward` returned.

    Args:
      q_BTNH: bfloat16 or float16, as k, v, out and dout; H is 64, 128 or 256.
      lse_BNT: float32, as `forward` returns it; sinks act through it alone.
      dout_BTNH: the cotangent of out_BTNH.
      start_BT: int32; query t saw the keys start_BT <= s < end_BT.
      softcap: c * tanh(logits / c); None is off.
      scale: multiplies the logits; positive.
    """
    plan = BackwardPlan(q_BTNH.shape, k_BSKH.shape, scale, softcap)
    multiple = math.lcm(tile.queries.num_warpgroups * ROWS, tile.keys.block_q)
    inputs = plan.inputs(
        *((q_BTNH, k_BSKH, v_BSKH), out_BTNH, lse_BNT, dout_BTNH, start_BT, end_BT),
        multiple=multiple,
    )
    dq_BTNH = backward_dq(plan, inputs, start_BT, end_BT, tile=tile.queries)
    dk_BSKH, dv_BSKH = backward_dkv(plan, inputs, start_BT, end_BT, tile=tile.keys)
    return dq_BTNH, dk_BSKH, dv_BSKH

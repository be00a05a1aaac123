# SPDX-License-Identifier: Apache-2.0
"""The passes of an attention call: which kernels they run, and with which tiles."""

import dataclasses
import math

import jax

from pallas_kernels.attention.hopper.backward_call import ROWS, BackwardCall
from pallas_kernels.attention.hopper.backward_dkv import backward_dkv
from pallas_kernels.attention.hopper.backward_dq import backward_dq
from pallas_kernels.attention.hopper.backward_fused import backward_fused
from pallas_kernels.attention.hopper.forward import forward_kernel
from pallas_kernels.attention.tiles import (
    FORWARD,
    FUSED_GRADIENT,
    BackwardTile,
    ForwardTile,
    KeyGradientTile,
    find_backward_tile,
    find_tile,
)
from pallas_kernels.target import Target


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What the kernels of a call are made from."""

    softcap: float | None
    scale: float
    forward: ForwardTile
    backward: BackwardTile
    fused: KeyGradientTile | None  # None: the deterministic backward pass


def find_kernels(
    target: Target,
    head_dim: int,
    *,
    causal: bool,
    softcap: float | None,
    scale: float,
    deterministic: bool,
) -> Kernels:
    """Returns the kernels of a call, with their tiles."""
    # The derivative of the soft-cap is 568 bytes a thread too many for heads of 64.
    spills = softcap is not None and head_dim == 64
    fused = not deterministic and head_dim in FUSED_GRADIENT.tiles and not spills
    return Kernels(
        softcap=softcap,
        scale=scale,
        forward=find_tile(target, FORWARD, head_dim, causal=causal),
        backward=find_backward_tile(target, head_dim, causal=causal),
        fused=find_tile(target, FUSED_GRADIENT, head_dim, causal=causal)
        if fused
        else None,
    )


def forward(
    kernels: Kernels,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    sinks_N: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns out_BTNH and lse_BNT of `forward_kernel`."""
    return forward_kernel(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        start_BT,
        end_BT,
        sinks_N,
        softcap=kernels.softcap,
        scale=kernels.scale,
        tile=kernels.forward,
    )


def backward(
    kernels: Kernels,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    out_BTNH: jax.Array,
    lse_BNT: jax.Array,
    dout_BTNH: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq_BTNH, dk_BSKH and dv_BSKH of what `forward` returned."""
    if kernels.fused is not None:
        return backward_fused(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            out_BTNH,
            lse_BNT,
            dout_BTNH,
            start_BT,
            end_BT,
            softcap=kernels.softcap,
            scale=kernels.scale,
            tile=kernels.fused,
        )
    return backward_split(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        out_BTNH,
        lse_BNT,
        dout_BTNH,
        start_BT,
        end_BT,
        softcap=kernels.softcap,
        scale=kernels.scale,
        tile=kernels.backward,
    )


def backward_split(
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
    """Returns deterministic dq_BTNH, dk_BSKH and dv_BSKH, from two kernels.

    One goes over tiles of queries and sums dQ, the other over tiles of keys and sums dK
    and dV. Both make the products q k and dout v: seven products, where
    `backward_fused` needs five.

    Args:
      q_BTNH: bfloat16 or float16, as k, v, out and dout; H is 64, 128 or 256.
      lse_BNT: float32, as `forward` returns it; sinks act through it alone.
      dout_BTNH: the cotangent of out_BTNH.
      start_BT: int32; query t saw the keys start_BT <= s < end_BT.
      softcap: c * tanh(logits / c); None is off.
      scale: multiplies the logits; positive.
    """
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
        multiple=math.lcm(tile.queries.num_warpgroups * ROWS, tile.keys.block_q),
    )
    dq_BTNH = backward_dq(call, inputs, start_BT, end_BT, tile=tile.queries)
    dk_BSKH, dv_BSKH = backward_dkv(call, inputs, start_BT, end_BT, tile=tile.keys)
    return dq_BTNH, dk_BSKH, dv_BSKH

# SPDX-License-Identifier: Apache-2.0
"""The attention operation: what it promises, and which implementation runs."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention.arguments import check_arguments
from pallas_kernels.attention.hopper import passes
from pallas_kernels.attention.ranges import key_ranges
from pallas_kernels.attention.reference import attention_reference
from pallas_kernels.attention.tiles import FORWARD, find_tile
from pallas_kernels.choice import Choice, Implementation, Shaped, choose
from pallas_kernels.target import INTERPRETED, current_target

HEAD_DIMS = (64, 128, 256)  # of the mosaic kernels
ROWS = 8  # of a tile in memory, into which those kernels write


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = True,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    window: int = 0,
    softcap: float | None = None,
    scale: float | None = None,
    sinks_N: jax.Array | None = None,
    deterministic: bool = True,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns attention, softmax(softcap(scale * q k^T)) v over the keys in sight.

    A remat policy that saves the names "attention" and "attention_lse" lets the
    backward pass run without a second forward kernel.

    Args:
      q_BTNH: bfloat16, float16 or float32, as k and v; N must be a multiple of K.
      causal: a query sees no key after its own place.
      segments_BT: int32 ids of the documents in a row; tokens see their own document
        only. A document is a run of equal ids; 0 is padding, whose output is zero.
        Needs T == S, and no positions_BT.
      positions_BT: int32 place of each query among the keys, for decoding. None: query
        t is key t, which needs T == S where causal or window ask for places.
      window: keys further than window - 1 from a query are out of sight; 0 is off,
        and so is a window of more than all keys.
      softcap: c * tanh(logits / c); None is off.
      scale: multiplies the logits; None is H**-0.5.
      sinks_N: logit, for each head, of one more key, which has no value.
      deterministic: whether gradients are the same to the bit each time, which costs
        some speed.
      implementation: "auto" takes what `choose_attention` says for this device.

    Returns:
      out_BTNH, dtype of q; 0 where no key is in sight. Accumulation is float32.

    Raises:
      ValueError: arguments that are wrong, or do not fit each other.
      NotImplementedError: the implementation named cannot do what was asked.
    """
    check_arguments(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
        sinks_N=sinks_N,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
    )
    scale = float(q_BTNH.shape[-1] ** -0.5 if scale is None else scale)
    chosen, _ = choose_attention(
        q_BTNH,
        k_BSKH,
        causal=causal,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
        window=window,
        softcap=softcap,
        scale=scale,
        sinks_N=sinks_N,
        deterministic=deterministic,
        implementation=implementation,
    )
    if chosen == "cudnn":
        left = min(window, k_BSKH.shape[1]) - 1
        out_BTNH = jax.nn.dot_product_attention(
            *(q_BTNH, k_BSKH, v_BSKH),
            is_causal=causal,
            local_window_size=(left, 0) if window else None,
            scale=scale,
            implementation="cudnn",
        )
        return checkpoint_name(out_BTNH, "attention")
    if chosen == "xla":
        out_BTNH = attention_reference(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            causal=causal,
            segments_BT=segments_BT,
            positions_BT=positions_BT,
            window=window,
            softcap=softcap,
            scale=scale,
            sinks_N=sinks_N,
        )
        return checkpoint_name(out_BTNH, "attention")
    kernels = passes.find_kernels(
        current_target(),
        q_BTNH.shape[-1],
        causal=causal,
        softcap=softcap,
        scale=scale,
        deterministic=deterministic,
    )
    start_BT, end_BT = key_ranges(
        q_BTNH.shape,
        k_BSKH.shape[1],
        causal=causal,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
        window=window,
    )
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    if sinks_N is not None or group * q_BTNH.shape[1] > kernels.forward.queries:
        return attention_with_gradient(
            kernels, q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, sinks_N
        )
    # Decoding: one block has the queries of all heads that read the same keys.
    start_BT = jnp.repeat(start_BT, group, axis=1)
    end_BT = jnp.repeat(end_BT, group, axis=1)
    q_BTKH = _stack_heads(q_BTNH, group)
    out_BTKH = attention_with_gradient(
        kernels, q_BTKH, k_BSKH, v_BSKH, start_BT, end_BT, None
    )
    return _unstack_heads(out_BTKH, group)


def choose_attention(
    q_BTNH: Shaped,
    k_BSKH: Shaped,
    *,
    causal: bool = True,
    segments_BT: Shaped | None = None,
    positions_BT: Shaped | None = None,
    start_BT: Shaped | None = None,
    window: int = 0,
    softcap: float | None = None,
    scale: float | None = None,
    sinks_N: Shaped | None = None,
    deterministic: bool = True,
    implementation: Implementation = "auto",
) -> Choice:
    """Returns the implementation to run and the reason, for a log.

    Args:
      q_BTNH: as the others, an argument of `attention`.
      k_BSKH: decides with q_BTNH which lengths the kernels see.
      start_BT: of `RangedAttention`, in whose place "cudnn" has nothing.

    Raises:
      ValueError: there is no such implementation.
      NotImplementedError: the one named cannot honour all that was asked.
    """
    target, dtype, head_dim = current_target(), str(q_BTNH.dtype), q_BTNH.shape[-1]
    lengths = q_BTNH.shape[1], k_BSKH.shape[1]
    if sinks_N is None and start_BT is None and head_dim in HEAD_DIMS:
        stacked = lengths[0] * (q_BTNH.shape[2] // k_BSKH.shape[2])
        if stacked <= find_tile(target, FORWARD, head_dim, causal=causal).queries:
            lengths = stacked, lengths[1]
    halves = ("bfloat16", "float16")
    widest = 256 if target.is_hopper else 128
    mosaic = {
        f"device {target.kind} (an NVIDIA Hopper GPU)": not target.is_hopper,
        f"dtype {dtype} ({' or '.join(halves)})": dtype not in halves,
        f"head width {head_dim} {HEAD_DIMS}": head_dim not in HEAD_DIMS,
        f"scale {scale} (positive)": scale is not None and scale <= 0,
        # Interpret mode takes any length; TMA's tiles have 8 rows.
        f"lengths {lengths} of queries and keys (up to 8, or multiples of 8)": (
            target != INTERPRETED and any(n > ROWS and n % ROWS for n in lengths)
        ),
    }
    # What jax.nn's cuDNN path would refuse late, or get wrong without a word.
    cudnn = {
        f"platform {target.platform}": (
            target.platform != "gpu" or target == INTERPRETED
        ),
        f"dtype {dtype}": dtype not in halves,
        f"head width {head_dim} (multiples of 8 up to {widest})": (
            head_dim % 8 != 0 or head_dim > widest
        ),
        "segments of packed documents": segments_BT is not None,
        "query positions": positions_BT is not None,
        "ranges of keys": start_BT is not None,
        f"window {window} without causal": window > 0 and not causal,
        f"softcap {softcap}": softcap is not None,
        "sinks": sinks_N is not None,
        "deterministic gradients": deterministic,
    }
    refusals = {
        name: [what for what, refused in found.items() if refused]
        for name, found in (("mosaic", mosaic), ("cudnn", cudnn))
    }
    return choose("attention", implementation, refusals)


def _stack_heads(x_BTNH: jax.Array, group: int) -> jax.Array:
    """Returns the heads of a group as queries, one after the other: [B, T G, K, H]."""
    b, t, n, h = x_BTNH.shape
    x_BTKGH = x_BTNH.reshape(b, t, n // group, group, h)
    return x_BTKGH.swapaxes(2, 3).reshape(b, t * group, n // group, h)


def _unstack_heads(x_BTKH: jax.Array, group: int) -> jax.Array:
    """Returns what `_stack_heads` was given."""
    b, t, k, h = x_BTKH.shape
    x_BTGKH = x_BTKH.reshape(b, t // group, group, k, h)
    return x_BTGKH.swapaxes(2, 3).reshape(b, t // group, k * group, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention_with_gradient(
    kernels: passes.Kernels,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """Returns out_BTNH of the kernels, whose gradient is their backward pass."""
    out_BTNH, _ = _forward(kernels, q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, sinks_N)
    return out_BTNH


def _forward(kernels, q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, sinks_N):
    inputs = (q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, sinks_N)
    out_BTNH, lse_BNT = passes.forward(kernels, *inputs)
    # Named here: a name given to the result outside would not cover what the backward
    # pass keeps of it, and remat would run the kernel again.
    out_BTNH = checkpoint_name(out_BTNH, "attention")
    lse_BNT = checkpoint_name(lse_BNT, "attention_lse")
    return out_BTNH, (inputs, out_BTNH, lse_BNT)


def _backward(kernels, residuals, dout_BTNH):
    inputs, out_BTNH, lse_BNT = residuals
    q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, sinks_N = inputs
    dq_BTNH, dk_BSKH, dv_BSKH = passes.backward(
        kernels,
        q_BTNH,
        k_BSKH,
        v_BSKH,
        out_BTNH,
        lse_BNT,
        dout_BTNH,
        start_BT,
        end_BT,
    )
    dsinks_N = None
    if sinks_N is not None:
        dsinks_N = _sinks_gradient(sinks_N, out_BTNH, lse_BNT, dout_BTNH)
    return dq_BTNH, dk_BSKH, dv_BSKH, None, None, dsinks_N


attention_with_gradient.defvjp(_forward, _backward)


def _sinks_gradient(sinks_N, out_BTNH, lse_BNT, dout_BTNH):
    """A sink's weight is exp(sink - lse), and its value 0."""
    delta_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32
    )
    weights_BNT = jnp.exp(sinks_N.astype(jnp.float32)[None, :, None] - lse_BNT)
    # Of a sink of -inf and no key in sight, -inf - -inf would be left.
    weights_BNT = jnp.where(jnp.isneginf(lse_BNT), 0.0, weights_BNT)
    return -(weights_BNT * delta_BNT).sum((0, 2)).astype(sinks_N.dtype)

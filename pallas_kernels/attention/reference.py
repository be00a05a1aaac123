# SPDX-License-Identifier: Apache-2.0
"""Attention in plain JAX: the specification of every implementation."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention.ranges import FAR


def attention_reference(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = True,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    window: int = 0,
    softcap: float | None = None,
    scale: float,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Returns what `attention` promises, with a T x S array of logits per head."""
    mask_BTS = visible_keys(
        q_BTNH.shape[1],
        k_BSKH.shape[1],
        causal=causal,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
        window=window,
    )
    out_BTNH, _ = masked_attention(
        q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N, softcap=softcap, scale=scale
    )
    return out_BTNH


def masked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    sinks_N: jax.Array | None,
    *,
    softcap: float | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns out_BTNH and lse_BNT: the log of the sum of exp(logits), sink included.

    Sums are float32, or float64 for float64 inputs. A query that sees no key gets 0;
    its lse is that of the sink alone, and without one -inf.
    """
    b, t, n, h = q_BTNH.shape
    k = k_BSKH.shape[2]
    wide = jnp.float64 if q_BTNH.dtype == jnp.float64 else jnp.float32
    q_BTKGH = q_BTNH.reshape(b, t, k, n // k, h)
    logits_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=wide
    )
    logits_BKGTS = logits_BKGTS * scale
    if softcap is not None:
        logits_BKGTS = softcap * jnp.tanh(logits_BKGTS / softcap)
    mask_B11TS = mask_BTS[:, None, None]
    logits_BKGTS = jnp.where(mask_B11TS, logits_BKGTS, -1e30)
    # No sink is a sink that weighs nothing.
    sinks_N = jnp.full(n, -jnp.inf) if sinks_N is None else sinks_N
    sinks_1KG11 = sinks_N.astype(wide).reshape(1, k, n // k, 1, 1)
    top_BKGT1 = jnp.maximum(logits_BKGTS.max(-1, keepdims=True), sinks_1KG11)
    top_BKGT1 = jax.lax.stop_gradient(top_BKGT1)
    weights_BKGTS = jnp.where(mask_B11TS, jnp.exp(logits_BKGTS - top_BKGT1), 0.0)
    total_BKGT1 = weights_BKGTS.sum(-1, keepdims=True)
    total_BKGT1 = total_BKGT1 + jnp.exp(sinks_1KG11 - top_BKGT1)
    lse_BKGT1 = jnp.where(total_BKGT1 > 0, top_BKGT1 + jnp.log(total_BKGT1), -jnp.inf)
    # A row that sees no key has weights 0 and must give 0, not 0 / 0.
    weights_BKGTS = weights_BKGTS / jnp.maximum(total_BKGT1, 1e-30)
    out_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        weights_BKGTS.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=wide,
    )
    out_BTNH = out_BTKGH.reshape(b, t, n, h).astype(q_BTNH.dtype)
    return out_BTNH, lse_BKGT1.reshape(b, n, t)


def masked_gradients(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    out_BTNH: jax.Array,
    lse_BNT: jax.Array,
    dout_BTNH: jax.Array,
    mask_BTS: jax.Array,
    *,
    softcap: float | None,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq_BTNH, dk_BSKH and dv_BSKH of `masked_attention`, from what it made.

    If out and lse are over more keys than these, so is what dq is a part of.
    """
    (b, t, n, h), k = q_BTNH.shape, k_BSKH.shape[2]
    wide = jnp.float64 if q_BTNH.dtype == jnp.float64 else jnp.float32
    shape = (b, t, k, n // k, h)
    q_BTKGH, dout_BTKGH = q_BTNH.reshape(shape), dout_BTNH.reshape(shape)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    logits_BKGTS = product("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * scale
    slope = scale
    if softcap is not None:
        tanh_BKGTS = jnp.tanh(logits_BKGTS / softcap)
        logits_BKGTS, slope = softcap * tanh_BKGTS, scale * (1 - tanh_BKGTS**2)
    lse_BKGT1 = lse_BNT.reshape(b, k, n // k, t, 1)
    weights_BKGTS = jnp.exp(
        jnp.where(mask_BTS[:, None, None], logits_BKGTS - lse_BKGT1, -jnp.inf)
    )
    delta_BTN = (out_BTNH.astype(wide) * dout_BTNH.astype(wide)).sum(-1)
    delta_BKGT1 = delta_BTN.swapaxes(1, 2).reshape(lse_BKGT1.shape)
    dweights_BKGTS = product("BTKGH,BSKH->BKGTS", dout_BTKGH, v_BSKH)
    dlogits_BKGTS = weights_BKGTS * (dweights_BKGTS - delta_BKGT1) * slope
    dlogits_BKGTS = dlogits_BKGTS.astype(q_BTNH.dtype)
    weights_BKGTS = weights_BKGTS.astype(q_BTNH.dtype)
    dq_BTKGH = product("BKGTS,BSKH->BTKGH", dlogits_BKGTS, k_BSKH)
    dk_BSKH = product("BKGTS,BTKGH->BSKH", dlogits_BKGTS, q_BTKGH)
    dv_BSKH = product("BKGTS,BTKGH->BSKH", weights_BKGTS, dout_BTKGH)
    dq_BTNH = dq_BTKGH.reshape(b, t, n, h).astype(q_BTNH.dtype)
    return dq_BTNH, dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype)


def visible_keys(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool = True,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    window: int = 0,
) -> jax.Array:
    """Returns mask_BTS: true where query t sees key s. B is 1 if rows do not differ."""
    if positions_BT is None:
        positions_BT = jnp.arange(num_queries, dtype=jnp.int32)[None]
    query_BT1 = positions_BT[:, :, None]
    key_11S = jnp.arange(num_keys, dtype=jnp.int32)[None, None]
    mask_BTS = jnp.broadcast_to(
        key_11S >= 0, (positions_BT.shape[0], num_queries, num_keys)
    )
    if causal:
        mask_BTS &= key_11S <= query_BT1
    if window:
        mask_BTS &= jnp.abs(key_11S - query_BT1) < min(window, FAR)
    if segments_BT is not None:
        # A document is a run of equal ids: an id that returns is another document.
        changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
        runs_BT = jnp.pad(jnp.cumsum(changes_BT, axis=1), ((0, 0), (1, 0)))
        same_BTS = runs_BT[:, :, None] == runs_BT[:, None, :]
        mask_BTS = mask_BTS & same_BTS & (segments_BT != 0)[:, :, None]
    return mask_BTS

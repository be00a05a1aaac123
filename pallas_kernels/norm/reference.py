# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm in plain JAX: the specification."""

import jax
import jax.numpy as jnp


def rms_norm_reference(
    x: jax.Array, scale: jax.Array, *, eps: float, offset: float = 0.0
) -> jax.Array:
    """Returns x / rms(x) * (offset + scale) over the last dim, in float32.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization"
    (arXiv:1910.07467).
    """
    h = _float(x)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return (h * _wide(_float(scale) + offset, h)).astype(x.dtype)


def layer_norm_reference(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, eps: float
) -> jax.Array:
    """Returns (x - mean) / std * scale + bias over the last dim, in float32.

    Source: Ba et al., "Layer Normalization" (arXiv:1607.06450).
    """
    h = _float(x)
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return (h * _wide(_float(scale), h) + _wide(_float(bias), h)).astype(x.dtype)


def _float(x: jax.Array) -> jax.Array:
    """Returns x in float32, or in float64 if it is."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _wide(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Gives a vector leading dims of 1; rank promotion is an error in this project."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)

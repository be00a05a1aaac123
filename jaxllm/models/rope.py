# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, with the scalings of published models.

Source: Su et al., "RoFormer" (arXiv:2104.09864), with the halves of a head paired as in
Llama's published weights for transformers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.config.model import Layer


def rotate(
    x_BTNH: jax.Array,
    positions_BT: jax.Array,
    config: ModelConfig,
    layer: Layer,
    length: int,
) -> jax.Array:
    """Returns heads turned by their position, as the layer asks.

    Args:
      x_BTNH: queries or keys.
      positions_BT: int32, of each token in its document.
      config: the model's settings.
      layer: the layer's kind.
      length: tokens that a row can have, which longrope chooses its factors by.
    """
    if not layer.rotates:
        return x_BTNH
    rope = config.rope
    theta, scaled = config.rope_theta, True
    if layer.window and rope.window_theta is not None:
        theta, scaled = rope.window_theta, False
    dims = rope.dims or x_BTNH.shape[-1]
    exponents = jnp.arange(dims // 2, dtype=jnp.float32) / (dims // 2)
    speeds = jnp.power(jnp.float32(theta), -exponents)
    magnitude = 1.0
    if scaled and rope.scaling != "none":
        speeds = speeds * scaling_factors(config, theta, length)
        magnitude = rope.magnitude or 1.0
    angles = positions_BT[:, :, None].astype(jnp.float32) * speeds[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    if rope.reversed:
        sin = -sin
    if magnitude != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    return _turn(x_BTNH, cos, sin, dims, rope.interleaved)


def _turn(x_BTNH, cos, sin, dims: int, interleaved: bool):
    turning = x_BTNH[..., :dims].astype(jnp.float32)
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = jnp.split(turning, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        out = jnp.stack(turned, axis=-1).reshape(turning.shape)
    else:
        out = jnp.concatenate(turned, axis=-1)
    out = out.astype(x_BTNH.dtype)
    if dims == x_BTNH.shape[-1]:
        return out
    return jnp.concatenate([out, x_BTNH[..., dims:]], axis=-1)


def scaling_factors(config: ModelConfig, theta: float, length: int) -> np.ndarray:
    """Returns what each frequency is multiplied by, float32.

    Source: linear: Chen et al. (arXiv:2306.15595); yarn: Peng et al.
    (arXiv:2309.00071), section 3.2; llama3: Llama Team (arXiv:2407.21783) and Meta's
    reference code; longrope: Ding et al. (arXiv:2402.13753). Longrope's factors are
    those of long rows where a row can have more tokens than the original length.
    """
    rope = config.rope
    num = (rope.dims or config.head_dim) // 2
    index = np.arange(num, dtype=np.float64)
    if rope.scaling == "longrope":
        long = length > rope.original_length
        factors = rope.long_factors if long else rope.short_factors
        return (1 / np.asarray(factors, np.float64)).astype(np.float32)
    stretched = 1 / rope.factor
    if rope.scaling == "linear":
        return np.full(num, stretched, np.float32)
    turns = rope.original_length * theta ** (-index / num) / (2 * math.pi)
    if rope.scaling == "llama3":
        kept = np.clip((turns - rope.slow) / (rope.fast - rope.slow), 0, 1)
    else:
        kept = 1 - np.clip(_yarn_ramp(index, theta, config), 0, 1)
    return (stretched + (1 - stretched) * kept).astype(np.float32)


def _yarn_ramp(index: np.ndarray, theta: float, config: ModelConfig) -> np.ndarray:
    """Returns 0 up to the frequency of `fast` turns, 1 from that of `slow` turns on."""
    rope = config.rope
    dims = rope.dims or config.head_dim

    def place(turns: float) -> float:
        original = rope.original_length
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(rope.fast), place(rope.slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    return (index - low) / (high - low if high != low else 0.001)

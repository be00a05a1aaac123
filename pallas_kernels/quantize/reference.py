# SPDX-License-Identifier: Apache-2.0
"""Quantisation to 8-bit floats in plain JAX: the specification."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Scaling = Literal["tensor", "rows_1x128", "blocks_128x128"]

BLOCK = 128
# Below it a block counts as zero: the inverse of its scale could not be represented.
LEAST_AMAX = 2.0**-100


class Quantized(NamedTuple):
    """8-bit values and what each must be multiplied by; also those of the transpose."""

    values: jax.Array  # [T, D]
    scales: jax.Array  # float32: [], [T, D / 128] or [T / 128, D / 128], rounded up
    amax: jax.Array  # float32: the largest magnitude of all; inf if there is a NaN
    transposed_values: jax.Array | None  # [D, T]
    transposed_scales: jax.Array | None  # as scales, of x^T


def quantize_reference(
    x_TD: jax.Array,
    *,
    scaling: Scaling,
    dtype: jnp.dtype,
    transpose: bool,
    power_of_two: bool,
    amax: jax.Array | None,
) -> Quantized:
    """Returns x in 8 bits, a scale for each block; see `quantize`."""
    x_TD = x_TD.astype(jnp.float32)
    largest = jnp.max(magnitude(x_TD))
    if scaling == "tensor":
        amaxes = largest if amax is None else amax.astype(jnp.float32)
    elif scaling == "rows_1x128":
        amaxes = _largest_of_blocks(x_TD, 1)
    else:
        amaxes = _largest_of_blocks(x_TD, BLOCK)
    scales = scale_of(amaxes, dtype, power_of_two)
    values = cast(x_TD, expand(1.0 / scales, x_TD.shape), dtype)
    if not transpose:
        return Quantized(values, scales, largest, None, None)
    if scaling == "rows_1x128":
        other = quantize_reference(
            x_TD.T,
            scaling=scaling,
            dtype=dtype,
            transpose=False,
            power_of_two=power_of_two,
            amax=None,
        )
        return Quantized(values, scales, largest, other.values, other.scales)
    return Quantized(values, scales, largest, values.T, scales.T)


def dequantize(values: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns what 8-bit values stand for, in float32; any of the scalings."""
    return values.astype(jnp.float32) * expand(scales, values.shape)


def scale_of(amax: jax.Array, dtype: jnp.dtype, power_of_two: bool) -> jax.Array:
    """Returns what scales dtype's largest finite value to amax; NaN if that is not.

    A power of two is rounded up, so that nothing saturates. A kernel computes it too.
    """
    largest = float(jnp.finfo(dtype).max)
    scale = jnp.where(amax < LEAST_AMAX, jnp.float32(1), amax * (1 / largest))
    if power_of_two:
        bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
        mantissa = (1 << 23) - 1
        scale = jax.lax.bitcast_convert_type(
            (bits + mantissa) & ~jnp.int32(mantissa), jnp.float32
        )
    return jnp.where(amax < jnp.inf, scale, jnp.float32(jnp.nan))


def magnitude(x: jax.Array) -> jax.Array:
    """Returns |x|, infinity for NaN: a maximum over it cannot miss one."""
    return jnp.where(x == x, jnp.abs(x), jnp.float32(jnp.inf))


def cast(x: jax.Array, inverse: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns x * inverse in dtype, at most its largest finite value; NaN stays NaN."""
    largest = float(jnp.finfo(dtype).max)
    x = x * inverse
    x = jnp.where(x > largest, largest, x)  # a minimum may lose NaN, on a CPU
    return jnp.where(x < -largest, -largest, x).astype(dtype)


def expand(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the scale of each value of an array of that shape."""
    if scales.ndim:
        for dim in (0, 1):
            if scales.shape[dim] != shape[dim]:
                scales = jnp.repeat(scales, BLOCK, axis=dim)
        return scales[: shape[0], : shape[1]]
    return jnp.broadcast_to(scales, shape)


def _largest_of_blocks(x_TD: jax.Array, rows: int) -> jax.Array:
    """Returns the largest magnitude of blocks of rows x 128, smaller at the edges."""
    (t, d), block = x_TD.shape, (rows, BLOCK)
    pads = [(0, -size % length) for size, length in zip((t, d), block, strict=True)]
    padded = jnp.pad(magnitude(x_TD), pads)
    in_blocks = padded.reshape(-1, rows, padded.shape[1] // BLOCK, BLOCK)
    return in_blocks.max(axis=(1, 3))

# SPDX-License-Identifier: Apache-2.0
"""Quantisation to 8-bit floats: argument checks and the choice of an implementation."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.choice import Choice, Implementation, Shaped, choose
from pallas_kernels.quantize.hopper.kernel import quantize_tiles
from pallas_kernels.quantize.reference import (
    BLOCK,
    Quantized,
    Scaling,
    magnitude,
    quantize_reference,
    scale_of,
)
from pallas_kernels.target import current_target

SCALINGS = ("tensor", "rows_1x128", "blocks_128x128")
DTYPES = ("float8_e4m3fn", "float8_e5m2")


def quantize(
    x_TD: jax.Array,
    *,
    scaling: Scaling,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    transpose: bool = False,
    power_of_two: bool = False,
    amax: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> Quantized:
    """Returns x in 8 bits: values * scales is near x; see `dequantize`.

    A scale is the block's largest magnitude over the largest finite value of dtype. A
    block of zeros (below 2**-100) has scale 1. A block with a NaN or an infinity is NaN
    throughout, so that a loss computed from it stops the run. It has no gradient:
    quantise in the rules of a `jax.custom_vjp`.

    Args:
      x_TD: bfloat16, float16 or float32; any T and D.
      scaling: "tensor", one scale; "rows_1x128", one for 128 values of a row; or
        "blocks_128x128". Blocks at the edges are smaller.
      dtype: float8_e4m3fn or float8_e5m2.
      transpose: return x^T quantised, too, from the same read of x. Of "rows_1x128"
        it has scales of its own, for 128 values of a column of x.
      power_of_two: round scales up to powers of two, so that scaling adds no error.
      amax: float32 scalar for "tensor": scale by this one, of earlier steps (delayed
        scaling, one read of x); what exceeds it saturates, infinities too. None: by the
        largest magnitude of x (current scaling, two reads).
      implementation: "auto" takes what `choose_quantize` says for this device.

    Raises:
      ValueError: arguments that do not fit each other.
      NotImplementedError: the implementation cannot do what was asked.

    Source: Micikevicius et al., "FP8 formats for deep learning" (arXiv:2209.05433),
    section 3; the blocks and powers of two are those of DeepSeek-AI, "DeepSeek-V3
    technical report" (arXiv:2412.19437), section 3.3.
    """
    dtype = jnp.dtype(dtype)
    _check(x_TD, scaling, dtype, amax)
    chosen, _ = choose_quantize(
        x_TD, transpose=transpose, implementation=implementation
    )
    if chosen == "xla":
        return quantize_reference(
            x_TD,
            scaling=scaling,
            dtype=dtype,
            transpose=transpose,
            power_of_two=power_of_two,
            amax=amax,
        )
    if scaling == "tensor" and amax is None:
        amax = jnp.max(magnitude(x_TD.astype(jnp.float32)))
    zero = jnp.float32(0)
    scale = scale_of(zero if amax is None else amax, dtype, power_of_two)
    values, amaxes, *others = quantize_tiles(
        x_TD,
        scale[None],
        scaling=scaling,
        dtype=dtype,
        transpose=transpose,
        power_of_two=power_of_two,
    )
    if scaling == "rows_1x128":
        scale = others.pop(0).T
    elif scaling == "blocks_128x128":
        scale = scale_of(amaxes, dtype, power_of_two)
    other_values = others[0] if transpose else None
    other_scales = (others[1:] or [scale])[0].T if transpose else None
    return Quantized(values, scale, amaxes.max(), other_values, other_scales)


def choose_quantize(
    x_TD: Shaped,
    *,
    transpose: bool = False,
    implementation: Implementation = "auto",
) -> Choice:
    """Returns the implementation to run and the reason, for a log.

    Raises:
      ValueError: there is no such implementation.
      NotImplementedError: it was named and cannot honour all that was asked.
    """
    target, (rows, columns) = current_target(), x_TD.shape
    row_step = BLOCK if transpose else 8  # Mosaic copies pieces of 8 rows
    found = {
        f"platform {target.platform}": target.platform != "gpu",
        f"{target.kind} (Hopper only)": target.platform == "gpu"
        and not target.is_hopper,
        f"dtype {x_TD.dtype} (bfloat16 and float16)": str(x_TD.dtype)
        not in ("bfloat16", "float16"),
        f"width {columns} (multiples of {BLOCK})": columns % BLOCK,
        f"{rows} rows (multiples of {row_step})": rows % row_step,
    }
    refusals = [name for name, refused in found.items() if refused]
    return choose("quantize", implementation, {"mosaic": refusals})


def _check(x_TD, scaling, dtype, amax):
    if x_TD.ndim != 2 or 0 in x_TD.shape:
        raise ValueError(f"quantize got x {x_TD.shape}: it must be [T, D], not empty.")
    if not jnp.issubdtype(x_TD.dtype, jnp.floating):
        raise ValueError(f"quantize got x of {x_TD.dtype}: it must be float.")
    if scaling not in SCALINGS:
        raise ValueError(
            f"quantize got scaling={scaling!r}: it must be one of {SCALINGS}."
        )
    if dtype.name not in DTYPES:
        raise ValueError(f"quantize got dtype={dtype}: it must be one of {DTYPES}.")
    if amax is not None and (scaling != "tensor" or amax.shape):
        raise ValueError(
            f"quantize got amax {amax.shape} with scaling={scaling!r}: it must be a "
            "scalar, and only 'tensor' has one."
        )

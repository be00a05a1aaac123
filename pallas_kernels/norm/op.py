# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm: argument checks, gradients, choice of an implementation."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.choice import Choice, Implementation, Shaped, choose
from pallas_kernels.norm.hopper.backward import backward
from pallas_kernels.norm.hopper.forward import forward
from pallas_kernels.norm.reference import layer_norm_reference, rms_norm_reference
from pallas_kernels.norm.tiles import BACKWARD, COPY_BYTES, FORWARD, Tile, find_tile
from pallas_kernels.target import Target, current_target


def rms_norm(
    x: jax.Array,
    scale: jax.Array,
    *,
    eps: float,
    offset: float = 0.0,
    residual: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> Any:
    """Returns x / rms(x) * (offset + scale) over the last dim.

    Args:
      x: bfloat16, float16 or float32.
      scale: [width] float32, or dtype of x.
      offset: 1.0 for norms whose scale is kept as its distance from 1.
      residual: like x. The norm is that of x + residual, rounded to dtype of x, and
        the result is (norm, sum). The gradient of the sum then needs no pass of its
        own. None: of x alone.
      implementation: "auto" takes what `choose_norm` says for this device.

    Returns:
      y, dtype of x, or (y, x + residual), named "norm" and "norm_sum" for remat
      policies. All between is float32. Gradients are deterministic.

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
      NotImplementedError: the implementation cannot do what was asked.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization"
    (arXiv:1910.07467).
    """
    _check("rms_norm", x, residual, eps, scale=scale)
    chosen = choose_norm(x, residual=residual, implementation=implementation)
    if chosen.implementation == "mosaic":
        weight = scale.astype(jnp.float32) + offset
        return _kernels(x, residual, weight, None, eps)
    total = x if residual is None else x + residual
    y = rms_norm_reference(total, scale, eps=eps, offset=offset)
    return y if residual is None else (y, total)


def layer_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    eps: float,
    residual: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> Any:
    """Returns (x - mean) / std * scale + bias over the last dim; see `rms_norm`.

    Source: Ba et al., "Layer Normalization" (arXiv:1607.06450).
    """
    _check("layer_norm", x, residual, eps, scale=scale, bias=bias)
    chosen = choose_norm(x, residual=residual, implementation=implementation)
    if chosen.implementation == "mosaic":
        scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
        return _kernels(x, residual, scale, bias, eps)
    total = x if residual is None else x + residual
    y = layer_norm_reference(total, scale, bias, eps=eps)
    return y if residual is None else (y, total)


def choose_norm(
    x: Shaped,
    *,
    residual: Shaped | None = None,
    implementation: Implementation = "auto",
) -> Choice:
    """Returns the implementation to run and the reason, for a log.

    "auto" leaves rows of no whole 16 bytes, which the copy engine cannot take, to plain
    JAX: on an H200 both passes took 156 us then, and 178 us with the kernels.

    Raises:
      ValueError: there is no such implementation.
      NotImplementedError: it was named and cannot honour all that was asked.
    """
    refusals = _mosaic_refusals(current_target(), x, residual is not None)
    slower = {}
    if not refusals and x.shape[-1] * x.dtype.itemsize % COPY_BYTES:
        slower["mosaic"] = f"mosaic: plain JAX is faster at width {x.shape[-1]}"
    return choose("norm", implementation, {"mosaic": refusals}, slower)


def _kernels(x, residual, weight_D, bias_D, eps):
    shape = (-1, x.shape[-1])
    flat = None if residual is None else residual.reshape(shape)
    outputs = _norm(x.reshape(shape), flat, weight_D, bias_D, eps)
    y, *total = (out.reshape(x.shape) for out in outputs)
    return (y, *total) if total else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _norm(x_RD, residual_RD, weight_D, bias_D, eps):
    tile = _tile(FORWARD, x_RD, 1 + (residual_RD is not None))
    *total, y_RD = forward(x_RD, residual_RD, weight_D, bias_D, eps=eps, tile=tile)
    return (y_RD, *total)


def _forward(x_RD, residual_RD, weight_D, bias_D, eps):
    y_RD, *total = _norm(x_RD, residual_RD, weight_D, bias_D, eps)
    # Named here, so that a policy that saves them saves what the backward kernel reads.
    y_RD = checkpoint_name(y_RD, "norm")
    total = [checkpoint_name(s_RD, "norm_sum") for s_RD in total]
    normed_RD = total[0] if total else x_RD
    return (y_RD, *total), (normed_RD, weight_D, bias_D is not None, bool(total))


def _backward(eps, saved, gradients):
    x_RD, weight_D, is_centered, has_residual = saved
    dy_RD, *dsum = gradients
    tile = _tile(BACKWARD, x_RD, 2 + has_residual)
    dx_RD, dweight_D, *dbias = backward(
        x_RD,
        dy_RD,
        dsum[0] if dsum else None,
        weight_D,
        eps=eps,
        is_centered=is_centered,
        tile=tile,
    )
    dresidual_RD = dx_RD if has_residual else None
    return dx_RD, dresidual_RD, dweight_D, dbias[0] if dbias else None


_norm.defvjp(_forward, _backward)


def _tile(kernel: str, x_RD: jax.Array, num_operands: int) -> Tile:
    width, itemsize = x_RD.shape[-1], x_RD.dtype.itemsize
    tile = find_tile(current_target(), kernel, width, itemsize, num_operands)
    assert tile is not None, "choose_norm refuses what no tile can do"
    return tile


def _mosaic_refusals(target: Target, x, has_residual: bool) -> list[str]:
    width, itemsize = x.shape[-1], x.dtype.itemsize
    tiles = (
        find_tile(target, FORWARD, width, itemsize, 1 + has_residual),
        find_tile(target, BACKWARD, width, itemsize, 2 + has_residual),
    )
    found = {
        f"platform {target.platform}": target.platform != "gpu",
        f"{target.kind} (Hopper only)": target.platform == "gpu"
        and not target.is_hopper,
        f"dtype {x.dtype} (bfloat16, float16 and float32)": str(x.dtype)
        not in ("bfloat16", "float16", "float32"),
        f"width {width} (multiples of 8 to 128, all to 6144, multiples of 256 to 12288 "
        "and of 512 to 24576": None in tiles,
        "empty arrays": math.prod(x.shape) == 0,
    }
    return [name for name, refused in found.items() if refused]


def _check(name, x, residual, eps, **vectors):
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} got x {x.dtype}{list(x.shape)}: it must be floating point, and "
            "have a last dim to normalise over."
        )
    for role, vector in vectors.items():
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} got {role} {vector.shape} for x {x.shape}: it must be "
                f"{x.shape[-1:]}."
            )
        if vector.dtype not in (jnp.float32, x.dtype):
            raise ValueError(
                f"{name} got {role} of {vector.dtype} for x of {x.dtype}: it must be "
                "float32, or dtype of x."
            )
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"{name} got residual {residual.dtype}{list(residual.shape)} for x "
            f"{x.dtype}{list(x.shape)}: both must be alike."
        )
    if not 0 <= eps < math.inf:
        raise ValueError(f"{name} got eps={eps}: it must be a number of at least 0.")

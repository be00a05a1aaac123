# SPDX-License-Identifier: Apache-2.0
"""Calls of the norms at the shapes of models."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Search, draw_normal
from pallas_kernels.norm.hopper.backward import backward
from pallas_kernels.norm.hopper.forward import forward
from pallas_kernels.norm.op import layer_norm, rms_norm
from pallas_kernels.norm.reference import layer_norm_reference, rms_norm_reference
from pallas_kernels.norm.tiles import Tile, candidates, find_tile
from pallas_kernels.target import H200

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of a width, and what is done to them."""

    name: str
    rows: int
    width: int
    kind: str = "rms"  # or "layer"
    residual: bool = True
    in_ci: bool = True


SHAPES = (
    Shape("rms-16k-4096", 16384, 4096),
    Shape("rms-8k-8192", 8192, 8192, in_ci=False),
    Shape("rms-8k-16384", 8192, 16384),
    Shape("rms-alone-16k-4096", 16384, 4096, residual=False, in_ci=False),
    Shape("rms-heads-1m-128", 1048576, 128, residual=False),
    Shape("rms-heads-1m-64", 1048576, 64, residual=False, in_ci=False),
    Shape("rms-16k-2880", 16384, 2880, in_ci=False),
    Shape("rms-odd-8k-2561", 8192, 2561),
    Shape("layer-16k-1024", 16384, 1024, kind="layer"),
    Shape("layer-8k-12288", 8192, 12288, kind="layer", in_ci=False),
)


TINY = (
    Shape("rms-tiny", 16, 256),
    Shape("layer-tiny", 16, 256, kind="layer", residual=False),
)


def cases() -> list[Case]:
    """Returns the forward and the backward pass of each shape."""
    return [make(shape) for shape in SHAPES for make in (_forward, _backward)]


def tiny_cases() -> list[Case]:
    """Returns the same at shapes that interpret mode finishes in seconds."""
    return [make(shape) for shape in TINY for make in (_forward, _backward)]


def _forward(shape: Shape) -> Case:
    def norm(x_RD, scale_D, *others, implementation):
        residual = others[-1] if shape.residual else None
        options: Any = dict(eps=EPS, residual=residual, implementation=implementation)
        if shape.kind == "layer":
            return layer_norm(x_RD, scale_D, others[0], **options)
        return rms_norm(x_RD, scale_D, **options)

    def with_tile(tile: Tile) -> Callable:
        def forward_kernel(x_RD, scale_D, *others):
            residual = others[-1] if shape.residual else None
            bias_D = others[0] if shape.kind == "layer" else None
            *total, y_RD = forward(x_RD, residual, scale_D, bias_D, eps=EPS, tile=tile)
            return (y_RD, *total) if total else y_RD

        return forward_kernel

    x, scale = _abstract(shape)
    bias = (scale,) if shape.kind == "layer" else ()
    return _case(
        "forward",
        shape,
        with_tile,
        mosaic=functools.partial(norm, implementation="mosaic"),
        xla=functools.partial(norm, implementation="xla"),
        inputs=(x, scale, *bias, *((x,) if shape.residual else ())),
        num_read=1 + shape.residual,
        num_written=1 + shape.residual,
    )


def _backward(shape: Shape) -> Case:
    def plain(x_RD, scale_D, dy_RD, *dsum):
        def normed(x_RD, scale_D):
            if shape.kind == "layer":
                bias_D = jnp.zeros_like(scale_D)
                return layer_norm_reference(x_RD, scale_D, bias_D, eps=EPS)
            return rms_norm_reference(x_RD, scale_D, eps=EPS)

        dx_RD, dscale_D = jax.vjp(normed, x_RD, scale_D)[1](dy_RD)
        return sum(dsum, dx_RD), dscale_D

    def with_tile(tile: Tile) -> Callable:
        def backward_kernel(x_RD, scale_D, dy_RD, *dsum):
            gradients = backward(
                x_RD,
                dy_RD,
                dsum[0] if dsum else None,
                scale_D,
                eps=EPS,
                is_centered=shape.kind == "layer",
                tile=tile,
            )
            return tuple(gradients[:2])

        return backward_kernel

    x, scale = _abstract(shape)
    return _case(
        "backward",
        shape,
        with_tile,
        # The kernel alone: behind the op, the forward one would run with it.
        mosaic=with_tile(_tile("backward", shape, 2 + shape.residual)),
        xla=plain,
        inputs=(x, scale, x, *((x,) if shape.residual else ())),
        num_read=2 + shape.residual,
        num_written=1,
    )


def _abstract(shape: Shape) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return (
        jax.ShapeDtypeStruct((shape.rows, shape.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.width,), jnp.float32),
    )


def _case(
    direction: str,
    shape: Shape,
    with_tile: Callable,
    *,
    mosaic: Callable,
    xla: Callable,
    inputs: tuple[jax.ShapeDtypeStruct, ...],
    num_read: int,
    num_written: int,
) -> Case:
    tile = _tile(direction, shape, num_read)
    return Case(
        operation="norm",
        name=f"{direction}-{shape.name}",
        functions={"mosaic": mosaic, "xla": xla},
        inputs=inputs,
        flops=0.0,
        num_bytes=2.0 * shape.rows * shape.width * (num_read + num_written),
        tile=tile,
        make_inputs=functools.partial(_make_inputs, inputs),
        call=dict(
            direction=direction, kind=shape.kind, residual=shape.residual, eps=EPS
        ),
        searches=(
            Search(
                kernel=f"norm_{direction}",
                call=dict(width=shape.width, itemsize=2, num_operands=num_read),
                tiles=candidates(f"norm_{direction}", tile, shape.width, 2, num_read),
                shipped=tile,
                function=with_tile,
            ),
        ),
        in_ci=shape.in_ci,
    )


def _tile(direction: str, shape: Shape, num_read: int) -> Tile:
    tile = find_tile(H200, f"norm_{direction}", shape.width, 2, num_read)
    assert tile is not None
    return tile


def _make_inputs(
    inputs: tuple[jax.ShapeDtypeStruct, ...], key: jax.Array
) -> tuple[Any, ...]:
    keys = jax.random.split(key, len(inputs))
    return tuple(
        draw_normal(k, x.shape, x.dtype) for k, x in zip(keys, inputs, strict=True)
    )

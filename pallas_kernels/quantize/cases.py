# SPDX-License-Identifier: Apache-2.0
"""Calls of quantisation at the shapes of activations and weights."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, draw_normal
from pallas_kernels.quantize.op import quantize
from pallas_kernels.quantize.reference import BLOCK, Scaling


def cases() -> list[Case]:
    """Returns every scaling, with and without the transpose."""
    return [
        _case("rows_1x128", 16384, 4096, transpose=True),
        _case("rows_1x128", 16384, 4096, transpose=False),
        _case("blocks_128x128", 8192, 14336, transpose=True),
        _case("blocks_128x128", 8192, 14336, transpose=False),
        _case("tensor", 16384, 4096, transpose=True),
        _case("tensor", 16384, 4096, transpose=False),
    ]


def tiny_cases() -> list[Case]:
    """Returns the same at a shape that interpret mode finishes in seconds."""
    return [
        _case("rows_1x128", 128, 128, transpose=True),
        _case("tensor", 128, 128, transpose=False),
    ]


def _case(scaling: Scaling, rows: int, columns: int, *, transpose: bool) -> Case:
    copies = 2 if transpose else 1
    reads = 2 if scaling == "tensor" else 1
    scales = rows * columns // BLOCK if scaling == "rows_1x128" else 0
    shape = jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)
    name = f"{scaling.partition('_')[0]}-{rows}x{columns}"

    def make_inputs(key: jax.Array) -> tuple[jax.Array]:
        return (draw_normal(key, shape.shape, shape.dtype),)

    def reference(x):
        # Narrowed as the kernels' input is: there is one right result, to the bit.
        return quantize(
            x.astype(shape.dtype),
            scaling=scaling,
            transpose=transpose,
            implementation="xla",
        )

    return Case(
        operation="quantize",
        name=f"{name}-both" if transpose else name,
        functions={
            implementation: functools.partial(
                quantize,
                scaling=scaling,
                transpose=transpose,
                implementation=implementation,
            )
            for implementation in ("mosaic", "xla")
        },
        inputs=(shape,),
        flops=0.0,
        num_bytes=rows * columns * (2.0 * reads + copies) + 4.0 * copies * scales,
        tile=None,
        make_inputs=make_inputs,
        reference=reference,
        call=dict(scaling=scaling, transpose=transpose),
    )

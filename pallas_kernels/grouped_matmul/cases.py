# SPDX-License-Identifier: Apache-2.0
"""Calls of the grouped matmul at the shapes of mixtures of experts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Search
from pallas_kernels.grouped_matmul.op import rows_times_rows, rows_times_weights
from pallas_kernels.grouped_matmul.tiles import Tile, untuned_tile

TILES = tuple(
    Tile(columns=columns, stages=stages, panel=panel)
    for columns, stages in ((256, 4), (256, 3), (128, 4), (128, 6))
    for panel in (4, 8, 16)
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A mixture: T rows of width D go to E experts of width F."""

    name: str
    rows: int
    experts: int
    d: int
    f: int
    in_ci: bool = True


SHAPES = (
    Shape("e8-16k-2048x1408", 16384, 8, 2048, 1408),
    Shape("e256-128k-7168x1024", 131072, 256, 7168, 1024, in_ci=False),
    Shape("e256-128k-1024x7168", 131072, 256, 1024, 7168, in_ci=False),
    Shape("e3-1000-192x320", 1000, 3, 192, 320),
)


def cases() -> list[Case]:
    """Returns the product, and the gradients of its rows and of its matrices."""
    makers = (_product, _rows_gradient, _weights_gradient)
    return [make(shape) for shape in SHAPES for make in makers]


def _product(shape: Shape) -> Case:
    inputs = ((shape.rows, shape.d), (shape.experts, shape.d, shape.f))
    return _case("product", shape, inputs, rows_times_weights, untuned_tile(shape.f))


def _rows_gradient(shape: Shape) -> Case:
    inputs = ((shape.rows, shape.f), (shape.experts, shape.d, shape.f))
    function = functools.partial(rows_times_weights, transposed=True)
    return _case("rows-gradient", shape, inputs, function, untuned_tile(shape.d))


def _weights_gradient(shape: Shape) -> Case:
    def function(x_TD, y_TF, group_sizes_E, **options):
        dtype = jnp.dtype(jnp.float32)
        return rows_times_rows(x_TD, y_TF, group_sizes_E, dtype, **options)

    inputs = ((shape.rows, shape.d), (shape.rows, shape.f))
    return _case("weights-gradient", shape, inputs, function, untuned_tile(shape.f))


def _case(
    kind: str, shape: Shape, inputs: tuple, function: Callable, tile: Tile
) -> Case:
    kernel = f"grouped_matmul_{'weights' if kind.startswith('w') else 'rows'}"
    columns = shape.d if kind == "rows-gradient" else shape.f
    x, y = (jax.ShapeDtypeStruct(dims, jnp.bfloat16) for dims in inputs)
    sizes = jax.ShapeDtypeStruct((shape.experts,), jnp.int32)

    def run_tile(tile: Tile) -> Callable:
        return functools.partial(function, implementation="mosaic", tile=tile)

    return Case(
        operation="grouped_matmul",
        name=f"{kind}-{shape.name}",
        functions={
            "mosaic": functools.partial(function, implementation="mosaic"),
            "xla": functools.partial(function, implementation="xla"),
        },
        inputs=(x, y, sizes),
        flops=2.0 * shape.rows * shape.d * shape.f,
        num_bytes=_num_bytes(kind, shape),
        tile=tile,
        make_inputs=functools.partial(_make_inputs, shape, inputs),
        call=dict(columns=columns, experts=shape.experts),
        search=Search(
            kernel=kernel, call={"columns": columns}, tiles=TILES, function=run_tile
        ),
        in_ci=shape.in_ci,
    )


def _num_bytes(kind: str, shape: Shape) -> float:
    rows, matrices = shape.rows * (shape.d + shape.f), shape.experts * shape.d * shape.f
    return 2.0 * rows + (4.0 if kind == "weights-gradient" else 2.0) * matrices


def _make_inputs(
    shape: Shape, inputs: tuple[tuple[int, ...], ...], key: jax.Array
) -> tuple[Any, ...]:
    """Returns random operands, and groups as uneven as an untrained router's."""
    keys = jax.random.split(key, 3)
    x, y = (
        jax.random.normal(k, dims, jnp.bfloat16)
        for k, dims in zip(keys, inputs, strict=False)
    )
    shares_E = jax.nn.softmax(jax.random.normal(keys[2], (shape.experts,)))
    ends_E = jnp.round(jnp.cumsum(shares_E) * shape.rows).astype(jnp.int32)
    return x, y, jnp.diff(ends_E, prepend=jnp.zeros((1,), jnp.int32))

# SPDX-License-Identifier: Apache-2.0
"""Calls of the grouped matmul at the shapes of mixtures of experts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Search, draw_normal
from pallas_kernels.grouped_matmul.op import rows_times_rows, rows_times_weights
from pallas_kernels.grouped_matmul.tiles import CANDIDATES, Tile, untuned_tile


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


TINY = (Shape("tiny", 256, 3, 128, 136),)
# XLA multiplies every row with every expert's matrix: more take minutes, or all memory.
MOST_EXPERTS_OF_XLA = 16
REFERENCE_ROWS = 512  # of one expert, multiplied at a time


def cases() -> list[Case]:
    """Returns the product, and the gradients of its rows and of its matrices."""
    makers = (_product, _rows_gradient, _weights_gradient)
    return [make(shape) for shape in SHAPES for make in makers]


def tiny_cases() -> list[Case]:
    """Returns the same at a shape that interpret mode finishes in seconds."""
    makers = (_product, _rows_gradient, _weights_gradient)
    return [make(shape) for shape in TINY for make in makers]


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

    functions: dict[str, Callable] = {
        "mosaic": functools.partial(function, implementation="mosaic")
    }
    if shape.experts <= MOST_EXPERTS_OF_XLA:
        functions["xla"] = functools.partial(function, implementation="xla")
    search = Search(
        kernel=kernel,
        call={"columns": columns},
        tiles=CANDIDATES,
        shipped=tile,
        function=run_tile,
    )
    return Case(
        operation="grouped_matmul",
        name=f"{kind}-{shape.name}",
        functions=functions,
        inputs=(x, y, sizes),
        flops=2.0 * shape.rows * shape.d * shape.f,
        num_bytes=_num_bytes(kind, shape),
        tile=tile,
        make_inputs=functools.partial(_make_inputs, shape, inputs),
        call=dict(columns=columns, experts=shape.experts),
        reference=functools.partial(_reference, kind),
        searches=(search,),
        gemms=("xla",),
        in_ci=shape.in_ci,
    )


def _reference(
    kind: str, x: jax.Array, y: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """Returns the product of each expert in turn, some of its rows at a time."""
    rows = x.shape[0]
    block = min(REFERENCE_ROWS, rows)
    ends_E = jnp.cumsum(group_sizes_E)
    starts_E = ends_E - group_sizes_E

    def slice_rows(tensor, first, expert):
        """Rows from first on, zero where they are another expert's or done."""
        at = jnp.minimum(first, rows - block)
        place = at + jnp.arange(block, dtype=jnp.int32)[:, None]
        mine = (place >= first) & (place < ends_E[expert])
        part = jax.lax.dynamic_slice_in_dim(tensor, at, block)
        return jnp.where(mine, part, jnp.zeros_like(part)), at

    def add_rows(expert, first, out):
        part, at = slice_rows(x, first, expert)
        weights = y[expert].T if kind == "rows-gradient" else y[expert]
        sum_ = jax.lax.dynamic_slice_in_dim(out, at, block) + jnp.dot(part, weights)
        return jax.lax.dynamic_update_slice_in_dim(out, sum_, at, 0)

    def add_weights(expert, first, out):
        part, _ = slice_rows(x, first, expert)
        others, _ = slice_rows(y, first, expert)
        return out.at[expert].add(jnp.dot(part.T, others))

    add = add_weights if kind == "weights-gradient" else add_rows
    width = y.shape[1] if kind != "product" else y.shape[2]
    shape = (rows, width)
    if kind == "weights-gradient":
        shape = (len(group_sizes_E), x.shape[1], width)

    def add_expert(out, expert):
        def step(state):
            first, out = state
            return first + block, add(expert, first, out)

        start = (starts_E[expert], out)
        _, out = jax.lax.while_loop(lambda s: s[0] < ends_E[expert], step, start)
        return out, None

    experts_E = jnp.arange(len(group_sizes_E), dtype=jnp.int32)
    return jax.lax.scan(add_expert, jnp.zeros(shape, jnp.float32), experts_E)[0]


def _num_bytes(kind: str, shape: Shape) -> float:
    rows, matrices = shape.rows * (shape.d + shape.f), shape.experts * shape.d * shape.f
    return 2.0 * rows + (4.0 if kind == "weights-gradient" else 2.0) * matrices


def _make_inputs(
    shape: Shape, inputs: tuple[tuple[int, ...], ...], key: jax.Array
) -> tuple[Any, ...]:
    """Returns random operands, and groups as uneven as an untrained router's."""
    keys = jax.random.split(key, 3)
    x, y = (
        draw_normal(k, dims, jnp.bfloat16)
        for k, dims in zip(keys, inputs, strict=False)
    )
    shares_E = jax.nn.softmax(draw_normal(keys[2], (shape.experts,), jnp.float32))
    ends_E = jnp.round(jnp.cumsum(shares_E) * shape.rows).astype(jnp.int32)
    return x, y, jnp.diff(ends_E, prepend=jnp.zeros((1,), jnp.int32))

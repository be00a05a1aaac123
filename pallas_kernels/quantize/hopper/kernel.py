# SPDX-License-Identifier: Apache-2.0
"""Quantisation on Hopper: one read of a tile gives values, scales and the transpose."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.quantize.reference import BLOCK, Scaling, cast, magnitude, scale_of

HALF = 64  # rows in registers at a time


def quantize_tiles(
    x: jax.Array,
    scale: jax.Array,
    *,
    scaling: Scaling,
    dtype: jnp.dtype,
    transpose: bool,
    power_of_two: bool,
) -> tuple[jax.Array, ...]:
    """Returns values and amax of 128 x 128 tiles, and what scaling and transpose add.

    Args:
      x: [rows, columns], bfloat16 or float16; columns a multiple of 128, rows of 8, or
        of 128 with transpose.
      scale: [1] float32, read if scaling is "tensor".

    Returns:
      values; amax [tiles of rows, tiles of columns]; of "rows_1x128" also its scales,
      [columns / 128, rows]; with transpose also values^T and, of "rows_1x128", their
      scales, [rows / 128, columns].
    """
    (rows, columns), by_rows = x.shape, scaling == "rows_1x128"
    grid = pl.cdiv(rows, BLOCK), pl.cdiv(columns, BLOCK)
    outs = [jax.ShapeDtypeStruct(x.shape, dtype)]
    outs += [jax.ShapeDtypeStruct(grid, jnp.float32)]
    scratch = [plgpu.Barrier(), _tile(x.dtype), _tile(dtype)]
    vector = plgpu.SMEM((BLOCK,), jnp.float32)
    if by_rows:
        outs += [jax.ShapeDtypeStruct((grid[1], rows), jnp.float32)]
        scratch += [vector]
    if transpose:
        outs += [jax.ShapeDtypeStruct((columns, rows), dtype)]
        scratch += [_tile(dtype)]
    if transpose and by_rows:
        outs += [jax.ShapeDtypeStruct((grid[0], columns), jnp.float32)]
        scratch += [vector]
    body = functools.partial(
        _body,
        num_outs=len(outs),
        scaling=scaling,
        to_scale=functools.partial(scale_of, dtype=dtype, power_of_two=power_of_two),
    )
    run = mosaic.kernel(
        body,
        name=f"quantize_{scaling}",
        out_type=tuple(outs),
        grid=grid,
        grid_names=("row", "column"),
        scratch_types=scratch,
    )
    return run(x, scale)


def _body(x, scale, *refs, num_outs: int, scaling: Scaling, to_scale):
    outs, (loaded, x_s, *buffers) = refs[:num_outs], refs[num_outs:]
    values, amaxes, *others = outs
    row, column = lax.axis_index("row"), lax.axis_index("column")
    rows, columns = pl.ds(row * BLOCK, BLOCK), pl.ds(column * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(x.at[rows, columns], x_s, loaded)
    plgpu.barrier_wait(loaded)

    if scaling == "rows_1x128":
        amaxes[row, column] = _quantize_rows(x_s, buffers[0], buffers[1], to_scale)
        places = [(values, (rows, columns)), (others[0], (column, rows))]
        if len(others) > 1:
            _quantize_rows(x_s.transpose((1, 0)), buffers[2], buffers[3], to_scale)
            places += [(others[1], (columns, rows)), (others[2], (row, columns))]
    else:
        amax = jnp.maximum(*(jnp.max(_row_amax(x_s, half)) for half in (0, 1)))
        amaxes[row, column] = amax
        # A vector of the same: Mosaic has no bitcast of scalars.
        amax = lax.broadcast_in_dim(amax, (HALF,), ())
        tensor = lax.broadcast_in_dim(scale[0], (HALF,), ())
        inverse = 1.0 / (tensor if scaling == "tensor" else to_scale(amax))
        _cast_tile(x_s, buffers[0], inverse)
        places = [(values, (rows, columns))]
        if others:
            _cast_tile(x_s.transpose((1, 0)), buffers[1], inverse)
            places += [(others[0], (columns, rows))]

    plgpu.commit_smem()
    for buffer, (out, place) in zip(buffers, places, strict=True):
        plgpu.copy_smem_to_gmem(buffer, out.at[place])
    plgpu.wait_smem_to_gmem(0)


def _quantize_rows(x_s, values, scales, to_scale) -> jax.Array:
    """Casts each row by its own scale; returns the largest magnitude of all."""
    largest = []
    for half in (0, 1):
        amax = _row_amax(x_s, half)
        scale = to_scale(amax)
        rows = pl.ds(half * HALF, HALF)
        scales[rows] = scale
        x = _half(x_s, half)
        inverse = lax.broadcast_in_dim(1.0 / scale, x.shape, (0,))
        values[rows, :] = cast(x, inverse, values.dtype)
        largest.append(jnp.max(amax))
    return jnp.maximum(*largest)


def _cast_tile(x_s, values, inverse) -> None:
    for half in (0, 1):
        x = _half(x_s, half)
        inverses = lax.broadcast_in_dim(inverse, x.shape, (0,))
        values[pl.ds(half * HALF, HALF), :] = cast(x, inverses, values.dtype)


def _row_amax(x_s, half: int) -> jax.Array:
    return jnp.max(magnitude(_half(x_s, half)), axis=1)


def _half(x_s, half: int) -> jax.Array:
    rows = x_s.at[pl.ds(half * HALF, HALF)]
    return plgpu.load(rows, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def _tile(dtype: Any) -> Any:
    """Returns a swizzled buffer of a tile, which TMA fills and empties."""
    transforms = (
        plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM((BLOCK, BLOCK), dtype, transforms=transforms)

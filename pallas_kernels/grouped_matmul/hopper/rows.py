# SPDX-License-Identifier: Apache-2.0
"""Rows times the matrix of their group: the forward kernel, and the one for d rows."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul.hopper import pipeline
from pallas_kernels.grouped_matmul.hopper.groups import ALIGNMENT, RowTiles
from pallas_kernels.grouped_matmul.hopper.pipeline import CHUNK
from pallas_kernels.grouped_matmul.tiles import (
    DEPTH,
    NUM_WARPGROUPS,
    ROWS_PER_WARPGROUP,
    Tile,
)

SLOTS = 2  # chunks of the output on their way from a warpgroup
# A copy may begin at any row of the ragged buffer, and TMA at multiples of 128 bytes
# only: each row is that long, and not swizzled.
RAGGED_CHUNK = 64


def multiply_rows(
    x: jax.Array,
    w: jax.Array,
    tiles: RowTiles,
    *,
    transposed: bool,
    tile: Tile,
    num_cores: int,
) -> jax.Array:
    """Returns each row of x times the matrix of its group, zeros for rows in none.

    Args:
      x: [rows, depth], bfloat16 or float16; multiples of 8 and of 64.
      w: [groups, depth, columns], dtype of x; [groups, columns, depth] if transposed.
      tiles: of `row_tiles`, for `tile.rows`.
      num_cores: blocks that run at once.
    """
    columns = w.shape[1] if transposed else w.shape[2]
    body = functools.partial(_body, transposed=transposed, tile=tile, blocks=num_cores)
    w_shape = (tile.columns, DEPTH) if transposed else (DEPTH, tile.columns)
    full, free = pipeline.barriers(tile)
    chunk = (ROWS_PER_WARPGROUP, CHUNK)
    run = mosaic.kernel(
        body,
        name="grouped_matmul_rows",
        out_type=jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype),
        grid=(num_cores,),
        grid_names=("block",),
        num_threads=NUM_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            pipeline.swizzled((tile.stages, tile.rows, DEPTH), x.dtype),
            pipeline.swizzled((tile.stages, *w_shape), x.dtype),
            pipeline.swizzled((NUM_WARPGROUPS, SLOTS, *chunk), x.dtype),
            plgpu.SMEM((NUM_WARPGROUPS, ROWS_PER_WARPGROUP, RAGGED_CHUNK), x.dtype),
            full,
            free,
        ],
    )
    return run(*tiles, x, w)


def _body(*refs, transposed: bool, tile: Tile, blocks: int):
    groups, bases, firsts, ends, used, x, w, out, *scratch = refs
    x_s, w_s, out_s, ragged_s, full, free = scratch
    num_groups = w.shape[0]
    num_columns = pl.cdiv(out.shape[1], tile.columns)
    num_steps = pl.cdiv(x.shape[1], DEPTH)
    warpgroup = lax.axis_index("warpgroup")
    row_tiles = used[0]

    def find(number):
        """Returns group, base, first and end of its rows; column; and steps."""
        row_tile, column = pipeline.place(number, row_tiles, num_columns, tile.panel)
        group, base, first, end = (
            ref[row_tile] for ref in (groups, bases, firsts, ends)
        )
        steps = jnp.where(group < num_groups, num_steps, 0)
        return group, base, first, end, column, steps

    run_tiles = functools.partial(
        pipeline.run_tiles, row_tiles * num_columns, blocks, find
    )

    @pl.when(warpgroup == pipeline.LOADER)
    def _():
        plgpu.set_max_registers(pipeline.LOADER_REGISTERS, action="decrease")

        def load_tile(found, step):
            group, base, _, _, column, steps = found
            rows = pl.ds(pl.multiple_of(base, ALIGNMENT), tile.rows)
            own = w.at[jnp.minimum(group, num_groups - 1)]
            columns = pl.ds(column * tile.columns, tile.columns)

            def load(i, stage, loaded):
                depth = pl.ds(i * DEPTH, DEPTH)
                w_part = (
                    own.at[columns, depth] if transposed else own.at[depth, columns]
                )
                plgpu.copy_gmem_to_smem(x.at[rows, depth], x_s.at[stage], loaded)
                plgpu.copy_gmem_to_smem(w_part, w_s.at[stage], loaded)

            return pipeline.load_steps(step, steps, tile, full, free, load)

        run_tiles(load_tile)

    @pl.when(warpgroup < pipeline.LOADER)
    def _():
        plgpu.set_max_registers(pipeline.COMPUTE_REGISTERS, action="increase")
        pipeline.free_all(tile, free)
        first_row = warpgroup * ROWS_PER_WARPGROUP
        own_rows = pl.ds(
            pl.multiple_of(first_row, ROWS_PER_WARPGROUP), ROWS_PER_WARPGROUP
        )

        def compute_tile(found, step):
            _, base, first, end, column, steps = found
            base = base + first_row
            first = jnp.maximum(first - first_row, 0)
            end = jnp.minimum(end - first_row, ROWS_PER_WARPGROUP)
            own_steps = jnp.where(end > 0, steps, 0)

            def multiply(accumulator, _, stage):
                w_stage = w_s.at[stage]
                w_stage = w_stage.transpose((1, 0)) if transposed else w_stage
                mosaic.wgmma(accumulator, x_s.at[stage, own_rows], w_stage)

            product = pipeline.multiply_steps(
                step, own_steps, tile, full, free, multiply
            )
            step = pipeline.finish_steps(step, own_steps, steps, tile, full, free)
            slots, ragged = out_s.at[warpgroup], ragged_s.at[warpgroup]
            product = product.astype(out.dtype)
            _store(product, out, slots, ragged, base, first, end, column * tile.columns)
            return step

        run_tiles(compute_tile)
        plgpu.wait_smem_to_gmem(0)


def _store(product, out, slots, ragged, base, first, end, column) -> None:
    """Stores the rows from `first` to `end`: those around them are other groups'."""
    size = end - first

    @pl.when(size == ROWS_PER_WARPGROUP)
    def _():
        rows = pl.ds(pl.multiple_of(base, ALIGNMENT), ROWS_PER_WARPGROUP)
        for i in range(product.shape[1] // CHUNK):
            # The first chunk may meet any slot of the tile before, long stored.
            plgpu.wait_smem_to_gmem(min(i, 1) * (SLOTS - 1), wait_read_only=True)
            slot = slots.at[i % SLOTS]
            slot[...] = product[:, i * CHUNK : (i + 1) * CHUNK]
            plgpu.commit_smem()
            columns = pl.ds(column + i * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(slot, out.at[rows, columns])

    @pl.when((size > 0) & (size < ROWS_PER_WARPGROUP))
    def _():
        for i in range(product.shape[1] // RAGGED_CHUNK):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            ragged[...] = product[:, i * RAGGED_CHUNK : (i + 1) * RAGGED_CHUNK]
            plgpu.commit_smem()
            columns = pl.ds(column + i * RAGGED_CHUNK, RAGGED_CHUNK)
            _store_ladder(ragged, out, base, first, size, columns)


def _store_ladder(source, out, base, first, size, columns) -> None:
    """Copies `size` rows: 32, 16, 8, ... of them, as the shape of a copy is static."""
    length = ROWS_PER_WARPGROUP // 2
    while length:

        @pl.when((size & length) != 0)
        def _(first=first, length=length):
            plgpu.copy_smem_to_gmem(
                source.at[pl.ds(first, length)],
                out.at[pl.ds(base + first, length), columns],
            )

        first = first + (size & length)
        length //= 2

# SPDX-License-Identifier: Apache-2.0
"""The gradient of each group's matrix: a contraction over the group's own rows."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul.hopper import pipeline
from pallas_kernels.grouped_matmul.hopper.groups import ALIGNMENT, Groups
from pallas_kernels.grouped_matmul.hopper.pipeline import CHUNK
from pallas_kernels.grouped_matmul.tiles import (
    DEPTH,
    NUM_WARPGROUPS,
    ROWS_PER_WARPGROUP,
    Tile,
)

SLOTS = 2  # chunks of the output on their way from a warpgroup
MASKED = 64  # columns of an operand that a warpgroup masks at a time


def multiply_weights(
    x: jax.Array,
    y: jax.Array,
    groups: Groups,
    *,
    dtype: jnp.dtype,
    tile: Tile,
    num_cores: int,
) -> jax.Array:
    """Returns x^T y of each group's rows: [groups, columns of x, columns of y].

    Args:
      x: [rows, any], bfloat16 or float16; multiples of 8 and of 64.
      y: [rows, any], dtype of x; a multiple of 64.
      dtype: of the result, float32 or that of x.
      num_cores: blocks that run at once.
    """
    full, free = pipeline.barriers(tile)
    stored = (NUM_WARPGROUPS, SLOTS, ROWS_PER_WARPGROUP, CHUNK)
    run = mosaic.kernel(
        functools.partial(_body, tile=tile, blocks=num_cores),
        name="grouped_matmul_weights",
        out_type=jax.ShapeDtypeStruct(
            (groups.ends.shape[0], x.shape[1], y.shape[1]), dtype
        ),
        grid=(num_cores,),
        grid_names=("block",),
        num_threads=NUM_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            pipeline.swizzled((tile.stages, DEPTH, tile.rows), x.dtype),
            pipeline.swizzled((tile.stages, DEPTH, tile.columns), x.dtype),
            pipeline.swizzled(stored, dtype),
            full,
            free,
            plgpu.Barrier(num_arrivals=NUM_WARPGROUPS),
        ],
    )
    return run(*groups, x, y)


def _body(*refs, tile: Tile, blocks: int):
    groups, bases, firsts, ends, x, y, out, *scratch = refs
    x_s, y_s, out_s, full, free, masked = scratch
    num_rows = pl.cdiv(out.shape[1], tile.rows)
    num_columns = pl.cdiv(out.shape[2], tile.columns)
    per_group = num_rows * num_columns
    warpgroup = lax.axis_index("warpgroup")

    def find(number):
        """Returns group, base, first and end of its rows; row, column; steps."""
        rank = lax.div(number, jnp.int32(per_group))
        row, column = pipeline.place(
            lax.rem(number, jnp.int32(per_group)), num_rows, num_columns, tile.panel
        )
        group, base, first, end = (ref[rank] for ref in (groups, bases, firsts, ends))
        # An empty group has a step too, of masked rows: it stores zeros.
        steps = jnp.maximum(lax.div(end + (DEPTH - 1), jnp.int32(DEPTH)), 1)
        return group, base, first, end, row, column, steps

    num_tiles = out.shape[0] * per_group
    run_tiles = functools.partial(pipeline.run_tiles, num_tiles, blocks, find)

    @pl.when(warpgroup == pipeline.LOADER)
    def _():
        plgpu.set_max_registers(pipeline.LOADER_REGISTERS, action="decrease")

        def load_tile(found, step):
            _, base, _, _, row, column, steps = found

            def load(i, stage, loaded):
                depth = pl.ds(pl.multiple_of(base + i * DEPTH, ALIGNMENT), DEPTH)
                x_part = x.at[depth, pl.ds(row * tile.rows, tile.rows)]
                y_part = y.at[depth, pl.ds(column * tile.columns, tile.columns)]
                plgpu.copy_gmem_to_smem(x_part, x_s.at[stage], loaded)
                plgpu.copy_gmem_to_smem(y_part, y_s.at[stage], loaded)

            return pipeline.load_steps(step, steps, tile, full, free, load)

        run_tiles(load_tile)

    @pl.when(warpgroup < pipeline.LOADER)
    def _():
        plgpu.set_max_registers(pipeline.COMPUTE_REGISTERS, action="increase")
        pipeline.free_all(tile, free)
        first_row = pl.multiple_of(warpgroup * ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)
        own_columns = pl.ds(first_row, ROWS_PER_WARPGROUP)

        def compute_tile(found, step):
            group, _, first, end, row, column, steps = found

            def multiply(accumulator, i, stage):
                own = first - i * DEPTH, end - i * DEPTH

                @pl.when((own[0] > 0) | (own[1] < DEPTH))
                def _():
                    _mask_rows(x_s.at[stage], *own, warpgroup)
                    _mask_rows(y_s.at[stage], *own, warpgroup)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(masked)
                    plgpu.barrier_wait(masked)

                x_own = x_s.at[stage].at[:, own_columns].transpose((1, 0))
                mosaic.wgmma(accumulator, x_own, y_s.at[stage])

            product = pipeline.multiply_steps(step, steps, tile, full, free, multiply)
            step = pipeline.finish_steps(step, steps, steps, tile, full, free)
            own_row = row * tile.rows + first_row
            own_out, slots = out.at[group], out_s.at[warpgroup]
            product = product.astype(out.dtype)
            _store(product, own_out, slots, own_row, column * tile.columns)
            return step

        run_tiles(compute_tile)
        plgpu.wait_smem_to_gmem(0)


def _mask_rows(ref, first, end, warpgroup) -> None:
    """Zeroes all rows but first to end; each warpgroup has every other piece.

    Both operands: 0 of one times NaN of the other, in a row of others, is NaN.
    """
    for piece in range(ref.shape[1] // MASKED):

        @pl.when(warpgroup == piece % NUM_WARPGROUPS)
        def _(piece=piece):
            part = ref.at[:, pl.ds(piece * MASKED, MASKED)]
            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            rows = plgpu.broadcasted_iota(
                jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA
            )
            part[...] = jnp.where(
                (rows >= first) & (rows < end), values, jnp.zeros_like(values)
            )


def _store(product, out, slots, row, column) -> None:
    """Stores what lies inside the matrix; TMA clips the rest."""
    for i in range(product.shape[1] // CHUNK):
        # The first chunk may meet any slot of the tile before, long stored.
        plgpu.wait_smem_to_gmem(min(i, 1) * (SLOTS - 1), wait_read_only=True)
        slot = slots.at[i % SLOTS]
        slot[...] = product[:, i * CHUNK : (i + 1) * CHUNK]
        plgpu.commit_smem()
        place = (pl.ds(row, ROWS_PER_WARPGROUP), pl.ds(column + i * CHUNK, CHUNK))
        plgpu.copy_smem_to_gmem(slot, out.at[place])

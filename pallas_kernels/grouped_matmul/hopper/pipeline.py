# SPDX-License-Identifier: Apache-2.0
"""What the grouped matmul's kernels share: the ring of loads, the tiles' order.

One warpgroup loads, two compute. A ring of stages in shared memory runs on from one
tile to the next, so that a tile's loads begin while the one before is being stored.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul.tiles import (
    NUM_WARPGROUPS,
    ROWS_PER_WARPGROUP,
    Tile,
)

LOADER = NUM_WARPGROUPS  # thread that loads; those before it compute
LOADER_REGISTERS, COMPUTE_REGISTERS = 40, 232  # of 65536 / 128 for three warpgroups
CHUNK = 32  # columns that are stored at a time
Numbers = tuple[jax.Array, ...]


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns a scratch buffer that TMA and wgmma use without bank conflicts."""
    width = min(128, shape[-1] * jnp.dtype(dtype).itemsize)  # bytes of a row of a tile
    transforms = (
        plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(width),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def barriers(tile: Tile) -> tuple[Any, Any]:
    """Returns those that say "this stage is loaded" and "this stage is read"."""
    full = plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages)
    free = plgpu.Barrier(num_arrivals=NUM_WARPGROUPS, num_barriers=tile.stages)
    return full, free


def run_tiles(
    num_tiles: jax.Array | int,
    num_blocks: int,
    find: Callable[[jax.Array], Numbers],
    body: Callable[[Numbers, jax.Array], jax.Array],
) -> None:
    """Runs a block's share of the tiles, round robin.

    Args:
      num_tiles: of all blocks, at least 1.
      num_blocks: those that run at once; the grid axis is "block".
      find: takes the number of a tile and returns what there is to know of it. It is
        called a tile ahead: what it reads of global memory takes as long as many steps.
      body: takes what find returned and the number of steps before the tile, of this
        block; returns the number of steps after it.
    """
    block = lax.axis_index("block")
    share = lax.div(num_tiles - block + num_blocks - 1, jnp.int32(num_blocks))

    def find_inside(i):
        return find(jnp.minimum(block + i * num_blocks, num_tiles - 1))

    def one(i, carry):
        step, tile = carry
        following = find_inside(i + 1)
        return body(tile, step), following

    lax.fori_loop(0, share, one, (jnp.int32(0), find_inside(0)))


def place(
    number: jax.Array, num_rows: jax.Array | int, num_columns: int, panel: int
) -> tuple[jax.Array, jax.Array]:
    """Returns row and column of a tile: panel after panel, each row by row.

    The blocks that run at the same time then share rows of one operand and columns of
    the other, and find them in the L2 cache.
    """
    in_panel = jnp.int32(panel) * num_rows
    first_column = lax.div(number, in_panel) * panel
    width = jnp.minimum(panel, num_columns - first_column)
    rest = lax.rem(number, in_panel)
    return lax.div(rest, width), first_column + lax.rem(rest, width)


def load_steps(
    step: jax.Array,
    num_steps: jax.Array | int,
    tile: Tile,
    full: Any,
    free: Any,
    load: Callable[[jax.Array, jax.Array, Any], None],
) -> jax.Array:
    """Loads all steps of a tile, each when its stage is free.

    Args:
      load: takes the step of the tile, the stage, and the barrier that its two copies
        arrive at.
    """

    def one(i, step):
        stage = lax.rem(step, jnp.int32(tile.stages))
        plgpu.barrier_wait(free.at[stage])
        load(i, stage, full.at[stage])
        return step + 1

    return lax.fori_loop(0, num_steps, one, step)


def free_all(tile: Tile, free: Any) -> None:
    """Says, before the first step, that nobody reads any stage."""
    for stage in range(tile.stages):
        plgpu.barrier_arrive(free.at[stage])


def multiply_steps(
    step: jax.Array,
    num_steps: jax.Array | int,
    tile: Tile,
    full: Any,
    free: Any,
    multiply: Callable[[Any, jax.Array, jax.Array], None],
) -> jax.Array:
    """Returns the sum of the products of all steps, each made when its stage is loaded.

    Args:
      multiply: takes an accumulator, a step of the tile and its stage; issues a wgmma.
    """

    def one(accumulator, i, step):
        stage = lax.rem(step, jnp.int32(tile.stages))
        plgpu.barrier_wait(full.at[stage])
        multiply(accumulator, i, stage)
        plgpu.wgmma_wait(1)  # the one before has read its stage

        @pl.when(i > 0)
        def _():
            plgpu.barrier_arrive(free.at[lax.rem(step - 1, jnp.int32(tile.stages))])

        return step + 1

    product, _ = mosaic.accumulate_loop(
        ROWS_PER_WARPGROUP, tile.columns, num_steps, one, step
    )
    return product


def finish_steps(
    step: jax.Array,
    own_steps: jax.Array | int,
    num_steps: jax.Array | int,
    tile: Tile,
    full: Any,
    free: Any,
) -> jax.Array:
    """Frees the last stage that was multiplied, and passes by the steps that were not.

    Args:
      own_steps: those that `multiply_steps` did, num_steps or 0.
    """

    @pl.when(own_steps > 0)
    def _():
        last = step + own_steps - 1
        plgpu.barrier_arrive(free.at[lax.rem(last, jnp.int32(tile.stages))])

    def skip(_, step):
        stage = lax.rem(step, jnp.int32(tile.stages))
        plgpu.barrier_wait(full.at[stage])
        plgpu.barrier_arrive(free.at[stage])
        return step + 1

    return lax.fori_loop(own_steps, num_steps, skip, step + own_steps)

# SPDX-License-Identifier: Apache-2.0
"""The way of rows through a kernel: in, worked on in place, out.

Each block takes every so many-th step of rows. Where rows can be copied in bulk, a ring
of slots in shared memory keeps several steps on their way: later ones come in and the
one before goes out while one is worked on, and no thread waits for global memory. Rows
whose bytes are no multiple of 16 are read and written by the threads themselves.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.norm.hopper import rows
from pallas_kernels.norm.tiles import WARPGROUP, Tile
from pallas_kernels.target import current_target

MAX_SUMS = 4  # of a row, in one step

# step(rows read, rows to write, number of the first row, carry, exchange) -> carry.
# `exchange(*sums)` returns sums of this warpgroup added up over those of the row.
Step = Callable[[Sequence[Any], Sequence[Any], Any, Any, Callable], Any]


def sweep(
    name: str,
    tile: Tile,
    inputs: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
    *,
    num_outputs: int,
    num_totals: int,
    prepare: Callable[[Sequence[Any]], tuple[Step, Any]],
) -> list[jax.Array]:
    """Runs a step on all rows.

    Args:
      name: of the CUDA kernel.
      inputs: [R, width] each.
      vectors: float32, as `rows.arrange` makes them.
      num_outputs: how many arrays like the inputs come out. Output i takes the place
        of input i in shared memory: a step reads all of input i first.
      num_totals: how many totals are carried from step to step.
      prepare: takes the refs of this warpgroup's vectors and returns the step, and what
        it is carried at first: the pieces of each total.

    Returns:
      The outputs, then each total: of each block, and each row of a step if they are
      narrow, what `rows.rearrange` makes a vector of.
    """
    num_rows, width = inputs[0].shape
    num_steps = pl.cdiv(num_rows, tile.rows)
    at_once = current_target().num_cores * tile.blocks_per_core
    blocks = min(num_steps, at_once) if at_once else num_steps
    inputs = [x.reshape(num_rows, *rows.shape(tile, width)) for x in inputs]
    like = jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype)
    total = jax.ShapeDtypeStruct((blocks, *_step_shape(tile)), jnp.float32)
    sizes = (len(inputs), len(vectors), num_outputs, num_totals)

    def body(*refs):
        read, fixed, written, totals, scratch = _split(refs, sizes)
        part = lax.axis_index("part") if tile.is_shared else None
        first = lax.axis_index("block")
        count = (num_steps - 1 - first) // blocks + 1
        block = _Block(tile, part, first, blocks, count)
        step, carry = prepare([block.part_of(ref) for ref in fixed])
        loop = _staged if tile.staged else _direct
        carry = loop(block, read, written, scratch, step, carry)
        for ref, pieces in zip(totals, carry, strict=True):
            for k, piece in enumerate(pieces):
                rows.store(tile, block.part_of(ref.at[first]), k, piece)

    outputs = mosaic.kernel(
        body,
        name=name,
        # Threads read in shared memory what they wrote themselves, unless warps
        # exchange sums there.
        barriers=tile.is_shared,
        out_type=[like] * num_outputs + [total] * num_totals,
        scratch_types=_scratch(tile, inputs),
        grid=(blocks,),
        grid_names=("block",),
        **(dict(num_threads=tile.parts, thread_name="part") if tile.is_shared else {}),
    )(*inputs, *vectors)
    flat = [out.reshape(num_rows, width) for out in outputs[:num_outputs]]
    return [*flat, *outputs[num_outputs:]]


@dataclasses.dataclass(frozen=True)
class _Block:
    """The steps of one block, as one of its warpgroups sees them."""

    tile: Tile
    part: Any
    first: Any
    stride: int
    count: Any

    def row(self, i: Any) -> Any:
        """Returns the number of the first row of its i-th step."""
        return (self.first + i * self.stride) * self.tile.rows

    def rows(self, ref: Any, i: Any) -> Any:
        """Returns the ref of the rows of its i-th step, in global memory."""
        if self.tile.is_narrow:
            return ref.at[pl.ds(self.row(i), self.tile.rows)]
        return self.part_of(ref.at[self.row(i)])

    def part_of(self, row_ref: Any) -> Any:
        """Returns the ref of what this warpgroup has of a row."""
        return row_ref.at[self.part] if self.tile.is_shared else row_ref


def _step_shape(tile: Tile) -> tuple[int, ...]:
    """Returns the shape of a step's rows, with room for pieces that stick out."""
    row = rows.shape(tile, tile.num_pieces * tile.piece * tile.parts * tile.lines)
    if tile.is_narrow:
        return tile.rows, 1, tile.num_pieces * tile.piece
    return row


def _split(refs: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    """Returns refs in groups of these sizes, and the rest."""
    ends = [*itertools.accumulate(sizes, initial=0), len(refs)]
    return [refs[start:end] for start, end in itertools.pairwise(ends)]


def _scratch(tile: Tile, inputs: Sequence[jax.Array]) -> list[Any]:
    scratch = []
    if tile.staged:
        full = plgpu.Barrier(
            num_arrivals=len(inputs), num_barriers=tile.slots * tile.parts
        )
        slots = (tile.slots, *_step_shape(tile))
        scratch += [*(plgpu.SMEM(slots, x.dtype) for x in inputs), full]
    if tile.is_shared:
        sums = 2 * MAX_SUMS * tile.parts * tile.lines
        scratch += [
            plgpu.SMEM((sums,), jnp.float32),
            plgpu.Barrier(num_arrivals=tile.parts),
        ]
    return scratch


def _staged(block, read, written, scratch, step, carry):
    """Runs the steps of a block through shared memory."""
    tile = block.tile
    buffers, (full,), meeting = _split(scratch, (len(read), 1))
    width = read[0].shape[-1]

    def exact(row):
        return row.at[pl.ds(0, width)] if tile.lanes == WARPGROUP else row

    def filled(slot):
        return full.at[slot * tile.parts + block.part if tile.is_shared else slot]

    def fill(i):
        slot = lax.rem(i, tile.slots)
        for ref, buffer in zip(read, buffers, strict=True):
            plgpu.copy_gmem_to_smem(
                block.rows(ref, i),
                exact(block.part_of(buffer.at[slot])),
                filled(slot),
                oob_mode=plgpu.OOBFillMode.UNDEFINED,  # rows behind the last one
            )

    # With one slot, it is filled again as soon as it is empty; with more, that is left
    # to the next step, and nobody waits.
    late = min(1, tile.slots - 1)

    def turn(i, carry):
        slot = lax.rem(i, tile.slots)
        plgpu.barrier_wait(filled(slot))
        ready = [block.part_of(buffer.at[slot]) for buffer in buffers]
        exchange = _exchange(block, meeting, i)
        carry = step(ready, ready[: len(written)], block.row(i), carry, exchange)
        plgpu.commit_smem()
        for ref, out in zip(written, ready, strict=False):
            plgpu.copy_smem_to_gmem(exact(out), block.rows(ref, i))

        @pl.when(jnp.logical_and(i >= late, i - late + tile.slots < block.count))
        def _():
            plgpu.wait_smem_to_gmem(late * len(written), wait_read_only=True)
            fill(i - late + tile.slots)

        return carry

    for i in range(tile.slots):
        pl.when(i < block.count)(functools.partial(fill, jnp.int32(i)))
    carry = lax.fori_loop(0, block.count, turn, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry


def _direct(block, read, written, scratch, step, carry):
    """Runs the steps of a block on rows in global memory."""

    def turn(i, carry):
        sources = [block.rows(ref, i) for ref in read]
        targets = [block.rows(ref, i) for ref in written]
        exchange = _exchange(block, scratch, i)
        return step(sources, targets, block.row(i), carry, exchange)

    return lax.fori_loop(0, block.count, turn, carry)


def _exchange(block, meeting, i):
    """Returns what adds up sums over the warps of a shared row, in step i."""
    tile = block.tile
    if not tile.is_shared:
        return lambda *sums: sums
    sums_ref, met = meeting
    taken = itertools.count()
    warps = tile.parts * tile.lines
    # A warpgroup may be one meeting ahead of another that still reads: steps use two
    # halves in turn, and each sum of a step has a place of its own.
    half = lax.rem(i, 2) * MAX_SUMS

    def exchange(*sums):
        # Mosaic would add over the warps of a warpgroup too, but in one place of shared
        # memory for all warpgroups of a block.
        places = [(half + next(taken)) * warps for _ in sums]
        for place, of_warps in zip(places, sums, strict=True):
            mine = pl.ds(place + block.part * tile.lines, tile.lines)
            sums_ref[mine] = of_warps
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        return [
            functools.reduce(jnp.add, [sums_ref[place + n] for n in range(warps)])
            for place in places
        ]

    return exchange

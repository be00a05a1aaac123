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
from pallas_kernels.norm.tiles import Tile
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
      inputs: [R, parts, width / parts] each.
      vectors: [parts, columns] each, as `rows.arrange` makes them.
      num_outputs: how many arrays like the inputs come out. Output i takes the place
        of input i in shared memory: a step reads all of input i first.
      num_totals: how many totals are carried from step to step.
      prepare: takes the refs of this warpgroup's vectors and returns the step, and what
        it is carried at first: the pieces of each total.

    Returns:
      The outputs, then of each total [blocks, parts, rows, columns]: its pieces as they
      were at the end of each block.
    """
    num_rows, parts, _ = inputs[0].shape
    num_steps = pl.cdiv(num_rows, tile.rows)
    blocks = min(num_steps, current_target().num_cores * tile.blocks_per_core)
    like = jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype)
    total = (blocks, parts, tile.rows, tile.num_pieces * tile.piece)
    sizes = (len(inputs), len(vectors), num_outputs, num_totals)

    def body(*refs):
        read, fixed, written, totals, scratch = _split(refs, sizes)
        part = lax.axis_index("part") if parts > 1 else 0
        first = lax.axis_index("block")
        count = (num_steps - 1 - first) // blocks + 1
        block = _Block(tile, part, first, blocks, count)
        step, carry = prepare([ref.at[part] for ref in fixed])
        loop = _staged if tile.staged else _direct
        carry = loop(block, read, written, scratch, step, carry)
        for ref, pieces in zip(totals, carry, strict=True):
            for k, piece in enumerate(pieces):
                place = pl.ds(k * tile.piece, tile.piece)
                ref[first, part, slice(None) if tile.is_narrow else 0, place] = piece

    return mosaic.kernel(
        body,
        name=name,
        # Threads read in shared memory what they wrote themselves, unless warpgroups
        # exchange sums there.
        barriers=parts > 1,
        out_type=[like] * num_outputs
        + [jax.ShapeDtypeStruct(total, jnp.float32)] * num_totals,
        scratch_types=_scratch(tile, inputs),
        grid=(blocks,),
        grid_names=("block",),
        **(dict(num_threads=parts, thread_name="part") if parts > 1 else {}),
    )(*inputs, *vectors)


@dataclasses.dataclass(frozen=True)
class _Block:
    """The steps of one block, as one of its warpgroups sees them."""

    tile: Tile
    part: Any
    first: Any
    stride: int
    count: Any

    def rows(self, ref: Any, i: Any) -> Any:
        """Returns the ref of the rows of its i-th step, in global memory."""
        row = self.row(i)
        return (
            ref.at[pl.ds(row, self.tile.rows)]
            if self.tile.is_narrow
            else ref.at[row, self.part]
        )

    def row(self, i: Any) -> Any:
        return (self.first + i * self.stride) * self.tile.rows


def _split(refs: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    """Returns refs in groups of these sizes, and the rest."""
    ends = [*itertools.accumulate(sizes, initial=0), len(refs)]
    return [refs[start:end] for start, end in itertools.pairwise(ends)]


def _scratch(tile: Tile, inputs: Sequence[jax.Array]) -> list[Any]:
    scratch = []
    if tile.staged:
        columns = tile.num_pieces * tile.piece
        shape = (tile.rows, 1, columns) if tile.is_narrow else (tile.parts, columns)
        scratch += [
            *(plgpu.SMEM((tile.slots, *shape), x.dtype) for x in inputs),
            plgpu.Barrier(
                num_arrivals=len(inputs), num_barriers=tile.slots * tile.parts
            ),
        ]
    if tile.parts > 1:
        scratch += [
            plgpu.SMEM((2 * MAX_SUMS * tile.parts,), jnp.float32),
            plgpu.Barrier(num_arrivals=tile.parts),
        ]
    return scratch


def _staged(block, read, written, scratch, step, carry):
    """Runs the steps of a block through shared memory."""
    tile, part = block.tile, block.part
    (buffers, (full,), meeting) = _split(scratch, (len(read), 1))
    width = read[0].shape[-1]

    def place(buffer, slot):
        return buffer.at[slot] if tile.is_narrow else buffer.at[slot, part]

    def exact(rows):
        return rows if tile.is_narrow else rows.at[pl.ds(0, width)]

    def fill(i):
        slot = lax.rem(i, tile.slots)
        for ref, buffer in zip(read, buffers, strict=True):
            plgpu.copy_gmem_to_smem(
                block.rows(ref, i),
                exact(place(buffer, slot)),
                full.at[slot * tile.parts + part],
                oob_mode=plgpu.OOBFillMode.UNDEFINED,  # rows behind the last one
            )

    # With one slot, it is filled again as soon as it is empty; with more, that is left
    # to the next step, and nobody waits.
    late = min(1, tile.slots - 1)

    def turn(i, carry):
        slot = lax.rem(i, tile.slots)
        plgpu.barrier_wait(full.at[slot * tile.parts + part])
        rows = [place(buffer, slot) for buffer in buffers]
        exchange = _exchange(block, meeting, i)
        carry = step(rows, rows[: len(written)], block.row(i), carry, exchange)
        plgpu.commit_smem()
        for ref, ready in zip(written, rows, strict=False):
            plgpu.copy_smem_to_gmem(exact(ready), block.rows(ref, i))

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
    """Returns what adds up sums over the warpgroups of a row, in step i."""
    parts = block.tile.parts
    if parts == 1:
        return lambda *sums: sums
    sums_ref, met = meeting
    taken = itertools.count()
    # A warpgroup may be one meeting ahead of another that still reads: steps use two
    # halves in turn, and each sum of a step has a place of its own.
    half = lax.rem(i, 2) * MAX_SUMS

    def exchange(*sums):
        places = [(half + next(taken)) * parts for _ in sums]
        for place, value in zip(places, sums, strict=True):
            sums_ref[place + block.part] = value
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        return [
            functools.reduce(jnp.add, [sums_ref[place + p] for p in range(parts)])
            for place in places
        ]

    return exchange

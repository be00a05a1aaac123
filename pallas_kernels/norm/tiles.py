# SPDX-License-Identifier: Apache-2.0
"""Tiles of the norms' kernels: which columns of a row each thread has, by rule.

Five integers place a row. Several warpgroups share it if it is wide, each thread has
`vector` neighbouring columns, and what is beyond one such load is a further piece:

    row    | part 0        | part 1        |  of `parts` warpgroups
    part   | 0 | 1 | 2 | 3 |                  if parts > 1: a quarter for each warp
    line   | piece | piece | piece |          `num_pieces` of `piece` columns each
    piece  | 0 | 1 | 2 | .. | 0 | 1 | ..      `vector` columns a thread, `lanes` threads

A line is a quarter, or the whole row if parts is 1. The other fields are how many rows
are on their way at once: `rows` of a step, `slots` for steps, blocks of a core.
"""

import dataclasses
import math

from pallas_kernels.target import Target
from pallas_kernels.tuning import look_up

# The kernels, in `devices/<kind>.json`.
FORWARD = "norm_forward"
BACKWARD = "norm_backward"

WARPGROUP = 128  # threads
SHARED_BYTES = 224 * 1024  # of a core, less what the system and barriers take
QUARTERS = 4  # warps of a warpgroup
COPY_BYTES = 16  # bulk copies move multiples of this, from and to multiples of it


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a norm divides rows of one width; the module's docstring has a picture.

    Rows are narrow: several to a warpgroup, and no sum leaves its warp. Or wide: one to
    a warpgroup. Or shared by several warpgroups, in quarters: one quarter of the
    part of a warpgroup to each of its warps. Either way a thread handles up to about 32
    columns, so that the gradient of the scale stays in its registers from row to row.
    """

    lanes: int  # threads that share a row, a quarter of a part if it is shared
    vector: int  # neighbouring elements of a thread
    parts: int  # warpgroups that share a row
    rows: int  # of a step; 1 if the rows are not narrow
    piece: int  # columns of a row, or quarter, that are handled at once
    num_pieces: int  # of a row, or quarter; the last of a wide row may stick out
    staged: bool  # through shared memory; else straight from and to global memory
    slots: int  # steps in shared memory at once: being read, worked on or written
    blocks_per_core: int  # 0: a block for each step, of a kernel without totals

    @property
    def is_narrow(self) -> bool:
        """Whether rows lie several to a warpgroup."""
        return self.parts == 1 and self.lanes < WARPGROUP

    @property
    def is_shared(self) -> bool:
        """Whether several warpgroups share a row."""
        return self.parts > 1

    @property
    def lines(self) -> int:
        """Rows, or quarters, that a warpgroup handles at once."""
        return QUARTERS if self.is_shared else self.rows

    @property
    def columns(self) -> int:
        """Columns of a thread."""
        return self.piece * self.num_pieces // self.lanes

    @property
    def registers(self) -> int:
        """What a thread has if all blocks of a core, or 1024 threads, are to fit."""
        blocks = self.blocks_per_core or max(1, 8 // self.parts)
        return min(255, 65536 // (WARPGROUP * self.parts * blocks))


def find_tile(
    target: Target, kernel: str, width: int, itemsize: int, num_operands: int
) -> Tile | None:
    """Returns the tile for rows of a width, or None if these kernels cannot.

    Args:
      kernel: FORWARD or BACKWARD.
      itemsize: bytes of an element.
      num_operands: arrays read, each of which takes its place in every slot.
    """
    tile = stage(kernel, width, itemsize)
    if tile is None:
        return None
    if kernel == FORWARD and num_operands > 1:
        tile = _direct(width, itemsize) or tile
    call = {"width": width, "itemsize": itemsize, "num_operands": num_operands}
    tile = dataclasses.replace(tile, **look_up(target, kernel, call))
    return with_slots(tile, itemsize * num_operands)


def candidates(
    kernel: str, shipped: Tile, width: int, itemsize: int, num_operands: int
) -> tuple[Tile, ...]:
    """Returns the shipped tile, and others with more or fewer bytes in flight.

    Also such as go past shared memory, with a block for every step if no totals are
    carried: blocks that wait for their row beside others that write theirs.
    """
    tile = stage(kernel, width, itemsize)
    assert tile is not None
    cuts = [tile]
    if not tile.is_narrow:
        shared = (share(width, parts, widest=8, most=8) for parts in (2, 4, 8))
        direct = [tile, *(cut for cut in shared if cut is not None)]
        cuts += [dataclasses.replace(cut, staged=False, slots=1) for cut in direct]
    direct_blocks = (0,) if kernel == FORWARD else (1, 2)
    others = [
        dataclasses.replace(cut, slots=slots, blocks_per_core=blocks)
        for cut in cuts
        for slots in ((2, 3, 4, 6, 8) if cut.staged else (cut.slots,))
        for blocks in ((1, 2, 3, 4, 6, 8) if cut.staged else direct_blocks)
        if blocks * cut.parts <= 8
    ]
    bytes_per_column = itemsize * num_operands
    fitting = [
        other for other in others if with_slots(other, bytes_per_column) == other
    ]
    return tuple(dict.fromkeys([shipped, *fitting]))


def stage(kernel: str, width: int, itemsize: int) -> Tile | None:
    """Returns the tile of rows that go through a ring of slots, None if there is none.

    Rows whose bytes are no multiple of 16 have the same tile, but not staged.
    """
    # Totals of narrow rows are float32, and a thread stores 16 bytes of them at most.
    widest = 16 // itemsize if kernel == FORWARD else 4
    tile = _narrow(width, itemsize, widest) or _shared(width) or _wide(width, itemsize)
    if tile is None:
        return None
    # A thread of the backward kernel holds twice as much, so fewer fit on a core.
    most = 4 if kernel == FORWARD else 2 + 2 * (tile.columns <= 16)
    return dataclasses.replace(tile, blocks_per_core=max(1, most // tile.parts))


def with_slots(tile: Tile, bytes_per_column: int) -> Tile | None:
    """Returns the tile with as many slots as fit, up to those it asks for."""
    if not tile.staged:
        return tile
    columns = tile.lines * tile.parts * tile.num_pieces * tile.piece
    for blocks in (tile.blocks_per_core, 1):
        fitting = SHARED_BYTES // blocks // (columns * bytes_per_column)
        if fitting:
            slots = min(tile.slots, fitting)
            return dataclasses.replace(tile, slots=slots, blocks_per_core=blocks)
    return None


def _narrow(width: int, itemsize: int, widest: int) -> Tile | None:
    """Divides rows so that 8, 16 or 32 threads share one, if the width allows."""
    for vector in (8, 4, 2, 1):
        for lanes in (32, 16, 8):
            piece = lanes * vector
            if vector > widest or width % piece or width > 40 * lanes:
                continue
            # 16 elements a thread and array: enough loads in flight, few registers.
            times = max(1, 16 * lanes // width)
            return Tile(
                lanes=lanes,
                vector=vector,
                parts=1,
                rows=WARPGROUP // lanes * times,
                piece=piece,
                num_pieces=width // piece,
                staged=width * itemsize % COPY_BYTES == 0,
                slots=6,
                blocks_per_core=0,
            )
    return None


def _shared(width: int) -> Tile | None:
    """Divides a row among two or four warpgroups, if it is too wide for one."""
    for parts, most in ((2, 16), (4, 8)):  # elements of a piece that registers allow
        if 16 * WARPGROUP * parts < width <= 48 * WARPGROUP * parts:
            tile = share(width, parts, widest=4, most=most)
            if tile is not None:
                return tile
    return None


def _direct(width: int, itemsize: int) -> Tile | None:
    """Gives each wide row a block of its own, straight from and to global memory.

    With a residual, that was faster than rows in a ring of slots at all widths that
    were measured from 4096 on, by 2 to 7 %: the device hands out blocks as others end.
    """
    if width < 4096:
        return None
    for most in (24, 32):  # elements of a thread
        for parts in (2, 4, 8):
            tile = share(width, parts, widest=16 // itemsize, most=8)
            if tile and tile.columns <= most and tile.vector * itemsize >= 8:
                return dataclasses.replace(tile, staged=False, slots=1)
    return None


def share(width: int, parts: int, *, widest: int, most: int) -> Tile | None:
    """Divides a row among warpgroups, or returns None if they cannot have equal parts.

    Args:
      widest: neighbouring elements of a thread, at most; a power of 2.
      most: elements of a thread in a piece, at most.
    """
    quarter, rest = divmod(width, parts * QUARTERS)
    if rest or quarter % 32:
        return None
    vector = math.gcd(quarter // 32, widest)
    counts = range(vector, most + 1, vector)
    count = max(n for n in counts if quarter % (32 * n) == 0)
    return Tile(
        lanes=32,
        vector=vector,
        parts=parts,
        rows=1,
        piece=32 * count,
        num_pieces=quarter // 32 // count,
        staged=True,
        slots=6,
        blocks_per_core=0,
    )


def _wide(width: int, itemsize: int) -> Tile | None:
    """Gives a row to a warpgroup."""
    if not WARPGROUP <= width <= 48 * WARPGROUP:
        return None
    cuts = _pieces(width, itemsize)
    vector, piece = min(cuts, key=lambda cut: _cost(width, *cut))
    return Tile(
        lanes=WARPGROUP,
        vector=vector,
        parts=1,
        rows=1,
        piece=piece,
        num_pieces=math.ceil(width / piece),
        staged=width * itemsize % COPY_BYTES == 0,
        slots=6,
        blocks_per_core=0,
    )


def _pieces(width: int, itemsize: int) -> list[tuple[int, int]]:
    """Returns the vectors and pieces, of 16 elements a thread at most, that fit."""
    return [
        (vector, WARPGROUP * count)
        for vector in (8, 4, 2, 1)
        for count in range(vector, 17, vector)
        if vector * itemsize <= 16
        and width % vector == 0
        and WARPGROUP * count <= width
    ]


def _cost(width: int, vector: int, piece: int) -> tuple[float, int]:
    """Weighs columns that stick out against the number of pieces and of loads."""
    return math.ceil(width / piece) * (piece + 64) * (1 + 0.1 / vector), -vector

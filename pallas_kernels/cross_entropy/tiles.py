# SPDX-License-Identifier: Apache-2.0
"""Tiles of the cross-entropy kernels, and how many rows of logits exist at once."""

import dataclasses

from pallas_kernels.target import Target
from pallas_kernels.tuning import look_up

# The kernels, in a profile and in `devices/<kind>.json`.
EXPONENTIALS = "cross_entropy_exponentials"
GRADIENT = "cross_entropy_gradient"

WARPGROUP = 128  # threads; one warpgroup reads a row
VECTOR = 8  # words that V is a multiple of: 16 bytes of bfloat16

# The least V there is a kernel for: one load of each thread, in the larger vector.
LEAST_WORDS = WARPGROUP * VECTOR

# Float32 logits that exist at one time: 256 MiB. For a vocabulary of 128256, that is a
# matmul of 512 rows, enough to be bound by arithmetic.
MOST_LOGITS = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What a step along a row holds in registers."""

    vector: int  # neighbouring words of a thread, 4 or 8; 16 bytes are a load's most
    loads: int  # vectors of a thread that are on their way at one time

    @property
    def words(self) -> int:
        """Words of a row that one step takes."""
        return WARPGROUP * self.vector * self.loads


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles that a kernel may run with."""

    default: Tile  # where none is on record
    candidates: tuple[Tile, ...]  # that a search times


# Four blocks on a core, which is one for each of 512 rows, have 128 registers a thread.
TILES = {
    EXPONENTIALS: Tiles(
        default=Tile(vector=4, loads=6),
        candidates=(
            Tile(vector=4, loads=2),
            Tile(vector=4, loads=4),
            Tile(vector=4, loads=6),
            Tile(vector=4, loads=8),
            Tile(vector=8, loads=2),
            Tile(vector=8, loads=3),
            Tile(vector=8, loads=4),
        ),
    ),
    GRADIENT: Tiles(
        default=Tile(vector=8, loads=4),
        candidates=(
            Tile(vector=8, loads=1),
            Tile(vector=8, loads=2),
            Tile(vector=8, loads=4),
            Tile(vector=8, loads=8),
        ),
    ),
}


def find_tile(target: Target, kernel: str, num_words: int) -> Tile:
    """Returns the tile for rows of num_words, which are at least `LEAST_WORDS`.

    Args:
      kernel: EXPONENTIALS or GRADIENT.
    """
    found = look_up(target, kernel, {})
    return fit(Tile(**found) if found else TILES[kernel].default, num_words)


def fit(tile: Tile, num_words: int) -> Tile:
    """Returns the tile with no more loads than make a row."""
    most = num_words // (WARPGROUP * tile.vector)
    return dataclasses.replace(tile, loads=min(tile.loads, most))


def rows_of_logits(num_words: int, num_tokens: int) -> int:
    """Returns for how many of a chunk's tokens one matmul makes the logits."""
    most = max(MOST_LOGITS // num_words // 128, 1) * 128  # 128: of tensor-core tiles
    parts = -(-num_tokens // most)
    return -(-num_tokens // parts)

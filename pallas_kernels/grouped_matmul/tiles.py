# SPDX-License-Identifier: Apache-2.0
"""Tiles of the grouped matmul's kernels."""

import dataclasses

from pallas_kernels.target import Target
from pallas_kernels.tuning import look_up

# A wgmma has 64 rows, and two warpgroups share a tile.
ROWS_PER_WARPGROUP = 64
NUM_WARPGROUPS = 2
DEPTH = 64  # of a step of the contraction: one 128-byte swizzle of a 16-bit dtype


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a kernel tiles its output, and how much it loads ahead."""

    columns: int = 256  # of the output, a multiple of 64; its rows are 128
    stages: int = 4  # steps of the contraction in shared memory
    panel: int = 8  # tiles side by side that run together, for the L2 cache

    @property
    def rows(self) -> int:
        """Rows of an output tile."""
        return NUM_WARPGROUPS * ROWS_PER_WARPGROUP


# That a search times; the default is `untuned_tile`, by rule.
CANDIDATES = tuple(
    Tile(columns=columns, stages=stages, panel=panel)
    for columns, stages in ((256, 4), (256, 3), (128, 4), (128, 6))
    for panel in (4, 8, 16)
)


def find_tile(target: Target, kernel: str, columns: int) -> Tile:
    """Returns the tile for an output of so many columns.

    Args:
      kernel: "grouped_matmul_rows" or "grouped_matmul_weights".
    """
    found = look_up(target, kernel, {"columns": columns})
    return Tile(**found) if found else untuned_tile(columns)


def untuned_tile(columns: int) -> Tile:
    """Returns the tile of the greatest reuse, for an output of so many columns."""
    # 256 columns: 48 KiB for 1024 clocks of wgmma. Fewer wait for the L2 cache.
    return Tile(columns=next((n for n in (64, 128) if columns <= n), 256))

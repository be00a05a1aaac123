# SPDX-License-Identifier: Apache-2.0
"""The tiles of the attention kernels: on record, or a default, and what to search.

A tile depends on the width of the heads, which decides how many registers the sums of
64 queries or keys take, and how many keys and values fit into shared memory.
"""

import dataclasses
from collections.abc import Mapping

from pallas_kernels.target import Target
from pallas_kernels.tuning import look_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardTile:
    """Tile of the forward kernel; two warpgroups share a block's keys."""

    block_q: int = 64  # queries of a warpgroup; a multiple of 64
    block_kv: int = 128  # keys of a step; a multiple of 64
    num_stages: int = 2  # blocks of keys, and of values, in shared memory

    @property
    def queries(self) -> int:
        """Queries of a block."""
        return 2 * self.block_q


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryGradientTile:
    """Tile of the backward kernel that loops over keys, for gradients of queries."""

    num_warpgroups: int = 2  # that compute; each has 64 queries
    block_kv: int = 128  # keys of a step; a multiple of 64
    num_stages: int = 2  # blocks of keys in shared memory
    num_value_stages: int = 2  # blocks of values, which are needed for a shorter time


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyGradientTile:
    """Tile of a backward kernel that loops over queries, for gradients of keys."""

    num_warpgroups: int = 2  # that compute; each has 64 keys; at H = 256 all share them
    block_q: int = 64  # queries of a step; a multiple of 64
    num_stages: int = 2  # blocks of queries in shared memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardTile:
    """Tiles of the two kernels of the deterministic backward pass."""

    queries: QueryGradientTile
    keys: KeyGradientTile


@dataclasses.dataclass(frozen=True)
class Tiles[Tile: (ForwardTile, QueryGradientTile, KeyGradientTile)]:
    """The tiles that a kernel may run with for heads of one width."""

    default: Tile  # where none is on record
    candidates: tuple[Tile, ...]  # that a search times


@dataclasses.dataclass(frozen=True)
class Kernel[Tile: (ForwardTile, QueryGradientTile, KeyGradientTile)]:
    """A kernel with something to choose."""

    name: str  # in `devices/<kind>.json`
    tiles: Mapping[int, Tiles[Tile]]  # by head width


FORWARD = Kernel(
    "attention_forward",
    {
        64: Tiles(
            default=ForwardTile(block_kv=128, num_stages=3),
            candidates=(
                ForwardTile(block_kv=64, num_stages=3),
                ForwardTile(block_kv=64, num_stages=4),
                ForwardTile(block_kv=128, num_stages=2),
                ForwardTile(block_kv=128, num_stages=3),
                ForwardTile(block_kv=128, num_stages=4),
            ),
        ),
        128: Tiles(
            default=ForwardTile(block_kv=128, num_stages=2),
            candidates=(
                ForwardTile(block_kv=64, num_stages=3),
                ForwardTile(block_kv=64, num_stages=4),
                ForwardTile(block_kv=128, num_stages=2),
                ForwardTile(block_kv=128, num_stages=3),
            ),
        ),
        256: Tiles(
            default=ForwardTile(block_kv=64, num_stages=2),
            candidates=(
                ForwardTile(block_kv=64, num_stages=1),
                ForwardTile(block_kv=64, num_stages=2),
            ),
        ),
    },
)

QUERY_GRADIENT = Kernel(
    "attention_backward_dq",
    {
        64: Tiles(
            default=QueryGradientTile(block_kv=128, num_stages=2, num_value_stages=2),
            candidates=(
                QueryGradientTile(block_kv=64, num_stages=3, num_value_stages=3),
                QueryGradientTile(block_kv=128, num_stages=2, num_value_stages=2),
                QueryGradientTile(block_kv=128, num_stages=3, num_value_stages=3),
                QueryGradientTile(
                    num_warpgroups=3, block_kv=64, num_stages=3, num_value_stages=3
                ),
                QueryGradientTile(
                    num_warpgroups=3, block_kv=128, num_stages=2, num_value_stages=2
                ),
            ),
        ),
        128: Tiles(
            default=QueryGradientTile(block_kv=128, num_stages=2, num_value_stages=2),
            candidates=(
                QueryGradientTile(block_kv=64, num_stages=2, num_value_stages=2),
                QueryGradientTile(block_kv=64, num_stages=3, num_value_stages=3),
                QueryGradientTile(block_kv=128, num_stages=2, num_value_stages=1),
                QueryGradientTile(block_kv=128, num_stages=2, num_value_stages=2),
                QueryGradientTile(
                    num_warpgroups=3, block_kv=64, num_stages=2, num_value_stages=2
                ),
            ),
        ),
        256: Tiles(
            default=QueryGradientTile(block_kv=64, num_stages=2, num_value_stages=1),
            candidates=(
                QueryGradientTile(block_kv=64, num_stages=1, num_value_stages=1),
                QueryGradientTile(block_kv=64, num_stages=2, num_value_stages=1),
            ),
        ),
    },
)

KEY_GRADIENT = Kernel(
    "attention_backward_dkv",
    {
        64: Tiles(
            default=KeyGradientTile(block_q=128, num_stages=2),
            candidates=(
                KeyGradientTile(block_q=64, num_stages=2),
                KeyGradientTile(block_q=64, num_stages=3),
                KeyGradientTile(block_q=128, num_stages=2),
                KeyGradientTile(block_q=128, num_stages=3),
                KeyGradientTile(num_warpgroups=3, block_q=64, num_stages=2),
                KeyGradientTile(num_warpgroups=3, block_q=64, num_stages=3),
            ),
        ),
        128: Tiles(
            default=KeyGradientTile(block_q=64, num_stages=3),
            candidates=(
                KeyGradientTile(block_q=64, num_stages=2),
                KeyGradientTile(block_q=64, num_stages=3),
                KeyGradientTile(num_warpgroups=3, block_q=64, num_stages=2),
            ),
        ),
        256: Tiles(
            default=KeyGradientTile(block_q=64, num_stages=2),
            candidates=(
                KeyGradientTile(block_q=64, num_stages=1),
                KeyGradientTile(block_q=64, num_stages=2),
            ),
        ),
    },
)

FUSED_GRADIENT = Kernel(
    "attention_backward_fused",
    {
        64: Tiles(
            # Spills 8 bytes with jax 0.11, none with 0.12.
            default=KeyGradientTile(block_q=128, num_stages=2),
            candidates=(
                KeyGradientTile(block_q=128, num_stages=2),
                KeyGradientTile(block_q=128, num_stages=3),
                KeyGradientTile(num_warpgroups=3, block_q=192, num_stages=2),
            ),
        ),
        128: Tiles(
            default=KeyGradientTile(block_q=64, num_stages=2),
            candidates=(
                KeyGradientTile(block_q=64, num_stages=1),
                KeyGradientTile(block_q=64, num_stages=2),
                KeyGradientTile(block_q=64, num_stages=3),
            ),
        ),
    },
)


def find_tile[Tile: (ForwardTile, QueryGradientTile, KeyGradientTile)](
    target: Target, kernel: Kernel[Tile], head_dim: int, *, causal: bool
) -> Tile:
    """Returns the tile to run a kernel with."""
    found = look_up(target, kernel.name, {"head_dim": head_dim, "causal": causal})
    return dataclasses.replace(kernel.tiles[head_dim].default, **found)


def find_backward_tile(target: Target, head_dim: int, *, causal: bool) -> BackwardTile:
    """Returns the tiles to run the two deterministic backward kernels with."""
    return BackwardTile(
        queries=find_tile(target, QUERY_GRADIENT, head_dim, causal=causal),
        keys=find_tile(target, KEY_GRADIENT, head_dim, causal=causal),
    )

# SPDX-License-Identifier: Apache-2.0
"""How the attention kernels cut their work: what the table says, or a default."""

import dataclasses

from pallas_kernels.target import Target
from pallas_kernels.tuning import find_tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardTile:
    """Cuts the forward kernel; two warpgroups share a block's keys."""

    block_q: int = 64  # queries of a warpgroup; a multiple of 64
    block_kv: int = 128  # keys of a step; a multiple of 64
    num_stages: int = 2  # blocks of keys, and of values, in shared memory

    @property
    def queries(self) -> int:
        """Queries of a block."""
        return 2 * self.block_q


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryGradientTile:
    """Cuts the backward kernel that goes over keys, for the gradients of queries."""

    num_warpgroups: int = 2  # that compute; each has 64 queries
    block_kv: int = 128  # keys of a step; a multiple of 64
    num_stages: int = 2  # blocks of keys in shared memory
    num_value_stages: int = 2  # blocks of values, which are needed for a shorter time


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyGradientTile:
    """Cuts a backward kernel that goes over queries, for the gradients of keys."""

    num_warpgroups: int = 2  # that compute; each has 64 keys; at H = 256 all share them
    block_q: int = 64  # queries of a step; a multiple of 64
    num_stages: int = 2  # blocks of queries in shared memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardTile:
    """Cuts the two kernels of the backward pass that gives the same bits each time."""

    queries: QueryGradientTile
    keys: KeyGradientTile


FORWARD = {
    64: ForwardTile(block_kv=128, num_stages=3),
    128: ForwardTile(block_kv=128, num_stages=2),
    256: ForwardTile(block_kv=64, num_stages=2),
}

QUERY_GRADIENT = {
    64: QueryGradientTile(),
    128: QueryGradientTile(),
    256: QueryGradientTile(block_kv=64, num_value_stages=1),
}
KEY_GRADIENT = {
    64: KeyGradientTile(block_q=128),
    128: KeyGradientTile(num_stages=3),
    256: KeyGradientTile(),
}
FUSED_GRADIENT = {
    64: KeyGradientTile(block_q=128),  # spills 8 bytes with jax 0.11, none with 0.12
    128: KeyGradientTile(),
}


def forward_tile(target: Target, head_dim: int, *, causal: bool) -> ForwardTile:
    """Returns the tile to run the forward kernel with."""
    call = {"head_dim": head_dim, "causal": causal}
    return dataclasses.replace(
        FORWARD[head_dim], **find_tile(target, "attention_forward", call)
    )


def backward_tile(target: Target, head_dim: int, *, causal: bool) -> BackwardTile:
    """Returns the tiles to run the deterministic backward kernels with."""
    call = {"head_dim": head_dim, "causal": causal}
    queries = find_tile(target, "attention_backward_dq", call)
    keys = find_tile(target, "attention_backward_dkv", call)
    return BackwardTile(
        queries=dataclasses.replace(QUERY_GRADIENT[head_dim], **queries),
        keys=dataclasses.replace(KEY_GRADIENT[head_dim], **keys),
    )


def fused_tile(target: Target, head_dim: int, *, causal: bool) -> KeyGradientTile:
    """Returns the tile to run the fused backward kernel with."""
    call = {"head_dim": head_dim, "causal": causal}
    return dataclasses.replace(
        FUSED_GRADIENT[head_dim], **find_tile(target, "attention_backward_fused", call)
    )

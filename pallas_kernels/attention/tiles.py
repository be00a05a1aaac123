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


FORWARD = {
    64: ForwardTile(block_kv=128, num_stages=3),
    128: ForwardTile(block_kv=128, num_stages=2),
    256: ForwardTile(block_kv=64, num_stages=2),
}


def forward_tile(target: Target, head_dim: int, *, causal: bool) -> ForwardTile:
    """Returns the tile to run the forward kernel with."""
    call = {"head_dim": head_dim, "causal": causal}
    return dataclasses.replace(
        FORWARD[head_dim], **find_tile(target, "attention_forward", call)
    )

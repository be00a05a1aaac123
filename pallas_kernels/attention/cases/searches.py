# SPDX-License-Identifier: Apache-2.0
"""The tiles that the attention kernels may run a call with, to be timed."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.attention.cases.shapes import Call
from pallas_kernels.attention.hopper.backward_fused import backward_fused
from pallas_kernels.attention.hopper.backward_split import backward
from pallas_kernels.attention.hopper.forward import forward
from pallas_kernels.attention.tiles import (
    BackwardTile,
    ForwardTile,
    KeyGradientTile,
    QueryGradientTile,
    backward_tile,
    forward_tile,
    fused_tile,
)
from pallas_kernels.case import Search
from pallas_kernels.target import Target

# By head width. (block_kv, num_stages)
FORWARD = {
    64: ((64, 3), (64, 4), (128, 2), (128, 3), (128, 4)),
    128: ((64, 3), (64, 4), (128, 2), (128, 3)),
    256: ((64, 1), (64, 2)),
}
# (num_warpgroups, block_kv, num_stages, num_value_stages)
QUERY_GRADIENT = {
    64: ((2, 64, 3, 3), (2, 128, 2, 2), (2, 128, 3, 3), (3, 64, 3, 3), (3, 128, 2, 2)),
    128: ((2, 64, 2, 2), (2, 64, 3, 3), (2, 128, 2, 1), (2, 128, 2, 2), (3, 64, 2, 2)),
    256: ((2, 64, 1, 1), (2, 64, 2, 1)),
}
# (num_warpgroups, block_q, num_stages)
KEY_GRADIENT = {
    64: ((2, 64, 2), (2, 64, 3), (2, 128, 2), (2, 128, 3), (3, 64, 2), (3, 64, 3)),
    128: ((2, 64, 2), (2, 64, 3), (3, 64, 2)),
    256: ((2, 64, 1), (2, 64, 2)),
}
FUSED_GRADIENT = {
    64: ((2, 128, 2), (2, 128, 3), (3, 192, 2)),
    128: ((2, 64, 1), (2, 64, 2), (2, 64, 3)),
}


def searches(call: Call, target: Target) -> tuple[Search, ...]:
    """Returns the search of each kernel that a call runs, but for the forward one of a
    call with both passes, which has its own case."""
    head_dim, causal = call.shape[-1], call.causal
    find = functools.partial(_search, call)
    if call.passes == "forward":
        shipped = forward_tile(target, head_dim, causal=causal)
        tiles = [ForwardTile(block_kv=b, num_stages=s) for b, s in FORWARD[head_dim]]
        return (find("forward", tiles, shipped, functools.partial(_forward, call)),)
    run = functools.partial(_both, call, target)
    if not call.deterministic:
        shipped = fused_tile(target, head_dim, causal=causal)
        tiles = _key_tiles(FUSED_GRADIENT[head_dim])
        return (find("backward_fused", tiles, shipped, run),)
    both = backward_tile(target, head_dim, causal=causal)
    query_tiles = [
        QueryGradientTile(
            num_warpgroups=w, block_kv=b, num_stages=s, num_value_stages=v
        )
        for w, b, s, v in QUERY_GRADIENT[head_dim]
    ]

    def with_queries(tile: QueryGradientTile) -> Callable:
        return run(BackwardTile(queries=tile, keys=both.keys))

    def with_keys(tile: KeyGradientTile) -> Callable:
        return run(BackwardTile(queries=both.queries, keys=tile))

    key_tiles = _key_tiles(KEY_GRADIENT[head_dim])
    return (
        find("backward_dq", query_tiles, both.queries, with_queries),
        find("backward_dkv", key_tiles, both.keys, with_keys),
    )


def _search(
    call: Call, kernel: str, tiles: Any, shipped: Any, function: Callable
) -> Search:
    return Search(
        kernel=f"attention_{kernel}",
        call={"head_dim": call.shape[-1], "causal": call.causal},
        tiles=tuple(tiles),
        shipped=shipped,
        function=function,
    )


def _key_tiles(sizes: Any) -> list[KeyGradientTile]:
    return [
        KeyGradientTile(num_warpgroups=w, block_q=b, num_stages=s) for w, b, s in sizes
    ]


def _forward(call: Call, tile: ForwardTile) -> Callable[..., jax.Array]:
    def run(q_BTNH, k_BSKH, v_BSKH, *others):
        extra = dict(zip(call.extra(), others, strict=True))
        return _attend(call, tile, (q_BTNH, k_BSKH, v_BSKH), extra)[0]

    return run


def _both(
    call: Call, target: Target, tile: BackwardTile | KeyGradientTile
) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns both passes, for the backward kernels need what forward leaves."""
    h = call.shape[-1]
    forward_one = forward_tile(target, h, causal=call.causal)
    options: dict[str, Any] = dict(softcap=call.softcap, scale=h**-0.5, tile=tile)
    differentiate: Any = backward if call.deterministic else backward_fused

    def run(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, *others):
        extra = dict(zip(call.extra(), others, strict=True))
        qkv = (q_BTNH, k_BSKH, v_BSKH)
        out_BTNH, lse_BNT = _attend(call, forward_one, qkv, extra)
        ranges = call.ranges(extra)
        return differentiate(*qkv, out_BTNH, lse_BNT, dout_BTNH, *ranges, **options)

    return run


def _attend(call: Call, tile: ForwardTile, qkv: Any, extra: dict[str, Any]) -> Any:
    arrays: Any = (*qkv, *call.ranges(extra), extra.get("sinks_N"))
    return forward(
        *arrays,
        softcap=call.softcap,
        scale=call.shape[-1] ** -0.5,
        tile=tile,
    )

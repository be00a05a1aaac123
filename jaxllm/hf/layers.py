# SPDX-License-Identifier: Apache-2.0
"""Which layers have experts, in a config.json: read and written."""

import math
from collections.abc import Callable
from typing import Any, Literal

from jaxllm.hf.rope import Settings

# Rules of families: all layers; those behind `first_k_dense_replace`; all but
# `mlp_only_layers`, every `decoder_sparse_step`-th; every `moe_layer_interval`-th from
# `moe_layer_start_index` to `moe_layer_end_index`.
Sparse = Literal["all", "behind", "unlisted", "between"]


def read_sparse(
    rule: Sparse, get: Callable[..., Any], num_layers: int, cycle: int
) -> Settings:
    """Returns moe.variant.first_dense and moe.variant.layers.

    Args:
      rule: of the family.
      get: gives the value of a key, or of its default.
      num_layers: of the model.
      cycle: layers after which the other kinds of layers begin again.
    """
    numbers = range(num_layers)
    match rule:
        case "behind":
            first = get("first_k_dense_replace")
            return _fewest(tuple(number >= first for number in numbers), cycle)
        case "unlisted":
            dense, step = get("mlp_only_layers", []), get("decoder_sparse_step", 1)
            return _fewest(
                tuple(n not in dense and (n + 1) % step == 0 for n in numbers), cycle
            )
        case "between":
            start, step = get("moe_layer_start_index"), get("moe_layer_interval")
            end = get("moe_layer_end_index") % num_layers  # -1 is the last one
            return _fewest(
                tuple(start <= n <= end and (n + 1) % step == 0 for n in numbers), cycle
            )
    return {}


def write_sparse(rule: Sparse, sparse: tuple[bool, ...]) -> dict[str, Any]:
    """Returns the keys that say which layers have experts, as far as the rule can."""
    first = sparse.index(True) if True in sparse else len(sparse)
    match rule:
        case "behind":
            return {"first_k_dense_replace": first}
        case "unlisted":
            dense = [number for number, each in enumerate(sparse) if not each]
            return {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        case "between":
            last = max((n for n, each in enumerate(sparse) if each), default=0)
            second = next((n for n in range(first + 1, last) if sparse[n]), last)
            return {
                "moe_layer_start_index": first,
                "moe_layer_end_index": last,
                "moe_layer_interval": max(second - first, 1),
            }
    return {}


def shortest(entries: tuple) -> tuple:
    """Returns the shortest tuple whose repetition gives the entries."""
    for size in range(1, len(entries) + 1):
        if (
            len(entries) % size == 0
            and entries[:size] * (len(entries) // size) == entries
        ):
            return entries[:size]
    return entries


def _fewest(sparse: tuple[bool, ...], cycle: int) -> Settings:
    """Returns the settings with which the fewest layers are compiled one by one."""
    dense = sparse.index(True) if True in sparse else 0
    found: list[tuple[int, int, int, tuple[bool, ...]]] = []
    for first in range(dense + 1):
        behind = shortest(sparse[first:])
        size = len(behind)
        if (len(sparse) - first) % cycle == 0:
            layers = tuple(behind[(n - first) % size] for n in range(size))
            found.append((first + math.lcm(size, cycle), size, first, layers))
    *_, first, layers = min(found)
    return {"moe.variant.first_dense": first, "moe.variant.layers": layers}

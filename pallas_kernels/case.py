# SPDX-License-Identifier: Apache-2.0
"""One call of an operation at real shapes: to compile, to check and to time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call, and the work that it cannot avoid."""

    operation: str  # folder of the operation
    name: str  # unique within the operation; words joined by "-"
    functions: dict[str, Callable]  # by implementation: "mosaic", "cudnn", "xla"
    inputs: tuple[jax.ShapeDtypeStruct, ...]  # positional arguments of each function
    flops: float  # useful ones: masked-out products do not count
    num_bytes: float  # each input read once and each output written once
    tile: Any  # what "mosaic" runs with
    make_inputs: Callable[[jax.Array], tuple[jax.Array, ...]]  # from a PRNG key

    def least_seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Returns the time below which no implementation can come."""
        return max(self.flops / flops_per_s, self.num_bytes / bytes_per_s)

# SPDX-License-Identifier: Apache-2.0
"""One call of an operation at real shapes: to compile, to check and to time."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Folders of operations, each with its `cases.py`.
OPERATIONS = ("attention", "norm", "cross_entropy", "grouped_matmul", "quantize")

# What `Case.least_seconds` assumes where nothing was measured: the best that an H200
# gave on random bfloat16 matrices and in a copy, bytes read and written.
H200_FLOPS_PER_S = 790e12
H200_BYTES_PER_S = 4.3e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """The tiles that one kernel of a case may run with, and where the best is kept."""

    kernel: str  # in `devices/<kind>.json`, such as "attention_forward"
    call: Mapping[str, Any]  # what `tuning.look_up` is asked for
    tiles: tuple[Any, ...]  # frozen dataclasses
    shipped: Any  # the one of them that "mosaic" runs with
    function: Callable[[Any], Callable]  # from a tile to what "mosaic" would run


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
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for bench/peers
    reference: Callable | None = None  # on float32 inputs, in little memory; None: xla
    searches: tuple[Search, ...] = ()  # of its kernels that have something to choose
    gemms: tuple[str, ...] = ()  # functions for which XLA tries some as it compiles
    in_ci: bool = True  # compiled in every test run; scripts compile all

    def least_seconds(
        self,
        flops_per_s: float = H200_FLOPS_PER_S,
        bytes_per_s: float = H200_BYTES_PER_S,
    ) -> float:
        """Returns the time below which no implementation can come."""
        return max(self.flops / flops_per_s, self.num_bytes / bytes_per_s)


def find_cases(operation: str, part: str = "", *, tiny: bool = False) -> list[Case]:
    """Returns the cases of an operation whose name contains part.

    Args:
      operation: one of `OPERATIONS`.
      part: "" is in every name.
      tiny: those at shapes that interpret mode finishes in seconds.
    """
    module = importlib.import_module(f"pallas_kernels.{operation}.cases")
    found = module.tiny_cases() if tiny else module.cases()
    return [case for case in found if part in case.name]


def draw_normal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Returns normal numbers that were drawn in float32 and rounded.

    Drawn in bfloat16, they have 128 different values and none above 2.89 (jax 0.12):
    a kernel would never meet an outlier.
    """
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)

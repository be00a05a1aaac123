# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs: the one rule for all operations.

Every operation has a `choose_<operation>`. It takes, by the same names, those arguments
of the operation that the choice depends on, where shapes and dtypes are enough, then
`implementation`; it reads the device from the mesh (`current_target`).
"""

import types
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax

Shaped = jax.Array | jax.ShapeDtypeStruct  # an array, or as much as tracing knows
Implementation = Literal["auto", "mosaic", "cudnn", "xla"]

# What `auto` tries, best first. "xla" is the plain JAX of a reference, which honours
# everything, so every list of refusals may leave it out.
PREFERENCE = ("mosaic", "cudnn", "xla")


class Choice(NamedTuple):
    """An implementation, and why it was taken, for a log."""

    implementation: str
    reason: str


def choose(
    operation: str,
    asked: Implementation,
    refusals: Mapping[str, list[str]],
    slower: Mapping[str, str] = types.MappingProxyType({}),
) -> Choice:
    """Returns the implementation asked for, or the best that honours everything.

    Args:
      operation: its name, for the error.
      asked: "auto", or the only one to be taken.
      refusals: for each implementation there is, what it cannot honour of this call.
      slower: why "auto" leaves out one that can, because plain JAX was faster.

    Raises:
      ValueError: there is no such implementation of this operation.
      NotImplementedError: the one asked for cannot honour all of the call; says what,
        and which implementations can.
    """
    refusals = {**refusals, "xla": []}
    able = [name for name in PREFERENCE if name in refusals and not refusals[name]]
    if asked == "auto":
        best = next(name for name in able if name not in slower)
        passed = [
            f"{n}: no {', no '.join(refusals[n])}" if refusals[n] else slower[n]
            for n in PREFERENCE[: PREFERENCE.index(best)]
            if n in refusals
        ]
        return Choice(best, "; ".join(passed) or "honours all that was asked")
    if asked not in refusals:
        raise ValueError(
            f"{operation} got implementation={asked!r}; it has "
            f"{', '.join(sorted(refusals))}, and auto."
        )
    if refusals[asked]:
        raise NotImplementedError(
            f"{operation} implementation={asked} cannot honour "
            f"{', '.join(refusals[asked])}; use {' or '.join(able)}, which can."
        )
    return Choice(asked, "asked for")

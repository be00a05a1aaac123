# SPDX-License-Identifier: Apache-2.0
"""The partition tables, and how letters become a `PartitionSpec`.

COMPUTE places activations, and weights while they are used. STORAGE places parameters,
gradients and optimizer state at rest: it also shards D, which a use gathers first.
RESIDUAL places what is between the layers' products, where `tensor` shards no width.

Between layers of experts, `expert` is one more axis of the batch.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

import jax

from sharding.alphabet import LETTERS
from sharding.errors import ShardingError

Table = Mapping[str, tuple[str, ...]]

COMPUTE: Table = {
    "B": ("data", "fsdp", "expert"),
    "T": ("context",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor", "stage"),
    "E": ("expert",),
    "P": ("stage",),
}

STORAGE: Table = {
    "D": ("fsdp", "expert"),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor", "stage"),
    "E": ("expert",),
    "L": ("stage",),
}

# The residual stream and its norms. `tensor` shards no letter of theirs and would have
# them whole on each of its devices: it shards T, as in sequence parallelism
# (Korthikanti et al., arXiv:2205.05198).
RESIDUAL: Table = {**COMPUTE, "T": ("context", "tensor")}

# It leaves an axis to another letter of its tensor: `expert` shards D in all weights
# but those of the experts.
YIELDS = "D"

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# The axes of the `shard_map` that is being traced, if any: see `cutting`.
_cutting: contextvars.ContextVar[frozenset[str] | None] = contextvars.ContextVar(
    "cutting", default=None
)


def free_axes(mesh: AnyMesh) -> frozenset[str]:
    """Returns the mesh axes that the tables may use here: sizes of 1 vanish.

    An axis that `shard_map` has taken over is not free inside, unless `cutting` says
    that it is this very `shard_map` that the tables describe.
    """
    cutting = _cutting.get()
    manual = jax.sharding.AxisType.Manual
    return frozenset(
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if mesh.shape[axis] > 1
        and (kind != manual if cutting is None else axis in cutting)
    )


@contextlib.contextmanager
def cutting(axes: frozenset[str]) -> Iterator[None]:
    """Says which axes shard the arguments of the `shard_map` that is being traced."""
    token = _cutting.set(axes)
    try:
        yield
    finally:
        _cutting.reset(token)


def axes_by_letter(letters: str, table: Table, mesh: AnyMesh) -> list[list[str]]:
    """Returns the free mesh axes that shard each dim of a tensor."""
    free = free_axes(mesh)
    claimed = {
        axis
        for letter in letters
        if letter not in YIELDS
        for axis in table.get(letter, ())
    }
    return [
        [
            axis
            for axis in table.get(letter, ())
            if axis in free and not (letter in YIELDS and axis in claimed)
        ]
        for letter in letters
    ]


def spec(letters: str, table: Table, mesh: AnyMesh) -> jax.P:
    """Returns where a tensor with these dims lives; mesh axes of size 1 vanish.

    Raises:
      ShardingError: if a letter is unknown, or two of them share a mesh axis.
    """
    taken: dict[str, str] = {}
    entries = []
    by_letter = axes_by_letter(letters, table, mesh)
    for letter, axes in zip(letters, by_letter, strict=True):
        if letter not in LETTERS:
            raise ShardingError(
                f"letter {letter!r} of {letters!r} is unknown; use one of "
                f"{''.join(LETTERS)} or add it to sharding/alphabet.py."
            )
        for axis in axes:
            if axis in taken:
                raise ShardingError(
                    f"mesh axis {axis} is used twice in {letters!r}, by "
                    f"{taken[axis]!r} and {letter!r}; one of their rules must name "
                    "another axis."
                )
            taken[axis] = letter
        entries.append(axes[0] if len(axes) == 1 else tuple(axes) or None)
    return jax.P(*entries)


def axes_of_entry(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes that a spec names for one dim."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def named_sharding(
    letters: str, table: Table, mesh: AnyMesh
) -> jax.sharding.NamedSharding:
    """Returns `spec` bound to its mesh."""
    return jax.NamedSharding(mesh, spec(letters, table, mesh))

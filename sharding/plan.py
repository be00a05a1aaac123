# SPDX-License-Identifier: Apache-2.0
"""Where every parameter lives, decided and checked on shapes alone."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from sharding.alphabet import LETTERS
from sharding.errors import ShardingError
from sharding.report import format_table
from sharding.rules import (
    RESIDUAL,
    STORAGE,
    AnyMesh,
    Table,
    axes_by_letter,
    axes_of_entry,
    spec,
)

LARGE_BYTES = 2**20  # a parameter from here on may not stay whole on every device


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of a plan."""

    path: str
    shape: tuple[int, ...]
    letters: str
    spec: jax.P
    rule: str  # the table, or the override's pattern
    total_bytes: int
    device_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The placement of a parameter tree on a mesh."""

    mesh: AnyMesh
    rows: tuple[Row, ...]

    def shardings(self, tree: Any) -> Any:
        """Returns the sharding of each leaf of a tree that mirrors the parameters.

        A leaf whose path ends in a parameter's path and has its shape lies as that
        parameter does: gradients and an optimizer's moments. So does one that has been
        averaged over some dims, which have size 1 then. Others are replicated.
        """
        known = {row.path: row for row in self.rows}

        def place(path, leaf):
            keys = _names(path)
            for start in range(len(keys)):
                row = known.get("/".join(keys[start:]))
                if row is not None and _is_average(leaf.shape, row.shape):
                    spec = _spec_of_average(leaf.shape, row)
                    return jax.NamedSharding(self.mesh, spec)
            return jax.NamedSharding(self.mesh, jax.P())

        return jax.tree.map_with_path(place, tree)

    def table(self) -> str:
        """Returns the plan as text: a line for each parameter, and the sums."""
        lines = [
            (
                row.path,
                "x".join(map(str, row.shape)),
                row.letters,
                str(tuple(row.spec)),
                f"{row.device_bytes / 2**20:.3f}",
                row.rule,
            )
            for row in self.rows
        ]
        sizes = {axis: n for axis, n in self.mesh.shape.items() if n > 1}
        count = sum(math.prod(row.shape) for row in self.rows)
        total = sum(row.total_bytes for row in self.rows) / 2**20
        device = sum(row.device_bytes for row in self.rows) / 2**20
        return format_table(
            f"mesh {sizes or 'of one device'}: {count:,} parameters, {total:.1f} MiB, "
            f"{device:.1f} MiB a device",
            ("parameter", "shape", "letters", "spec", "MiB/device", "rule"),
            lines,
        )


def plan(
    abstract: Any,
    letters: Mapping[str, str],
    mesh: AnyMesh,
    *,
    table: Table = STORAGE,
    overrides: Mapping[str, jax.P] | None = None,
    dims: Mapping[str, tuple[str, int]] | None = None,
) -> Plan:
    """Returns where every parameter lives, or one error that lists all misfits.

    Pure: reads shapes, touches no device, traces nothing.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct`, with string keys.
      letters: the letters of each parameter, by its path ("blocks/0/attention/query").
      mesh: real or abstract.
      table: places parameters by letter.
      overrides: pattern that must match a whole path -> its spec; the first match wins.
      dims: letter -> (setting, size) of activations, checked against RESIDUAL.

    Raises:
      ShardingError: unknown letter; letters that do not fit the rank; a mesh axis used
        twice or unknown; a dim that an axis does not divide; a parameter of 1 MiB or
        more on every device though an axis could shard it; an override that matches
        nothing; a mesh axis that shards no parameter.
    """
    overrides = overrides or {}
    problems: list[str] = []
    rows = [
        _row(_path(path), leaf, letters, mesh, table, overrides, problems)
        for path, leaf in jax.tree.leaves_with_path(abstract)
    ]
    problems += _misfits_of_dims(dims or {}, mesh)
    matched = {row.rule for row in rows}
    for pattern in overrides:
        if pattern not in matched:
            problems.append(f"override {pattern!r} matches no parameter; remove it.")
    problems += _unused_axes(rows, mesh, table)
    if problems:
        text = "\n".join(f"  - {problem}" for problem in problems)
        raise ShardingError(f"the mesh and the model do not fit together:\n{text}")
    return Plan(mesh, tuple(rows))


def _is_average(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    return len(shape) == len(of) and all(
        size in (1, full) for size, full in zip(shape, of, strict=True)
    )


def _spec_of_average(shape: tuple[int, ...], row: Row) -> jax.P:
    entries = [
        entry if size == full else None
        for entry, size, full in zip(row.spec, shape, row.shape, strict=False)
    ]
    return jax.P(*entries)


def _row(path, leaf, letters, mesh, table, overrides, problems) -> Row:
    axes = letters.get(path)
    rule = next((p for p in overrides if re.fullmatch(p, path)), "")
    placed = jax.P()
    if rule:
        placed = overrides[rule]
        problems += _misfits_of_spec(path, leaf.shape, placed, mesh)
    elif axes is None:
        problems.append(f"{path} {leaf.shape} has no letters; declare its axes=.")
    elif len(axes) != len(leaf.shape):
        problems.append(
            f"{path} has {len(leaf.shape)} dims {leaf.shape} but letters {axes!r}; "
            "declare one letter a dim."
        )
    else:
        try:
            placed = spec(axes, table, mesh)
        except ShardingError as error:
            problems.append(f"{path}: {error}")
        by_letter = axes_by_letter(axes, table, mesh)
        for letter, size, cut in zip(axes, leaf.shape, by_letter, strict=True):
            where = f"{path} {axes}={leaf.shape}"
            problems += _misfit(where, letter, size, mesh, cut)
    total = math.prod(leaf.shape) * leaf.dtype.itemsize
    row = Row(
        path=path,
        shape=leaf.shape,
        letters=axes or "?",
        spec=placed,
        rule=rule or "letters",
        total_bytes=total,
        device_bytes=total // _num_shards(placed, mesh),
    )
    if not rule and total >= LARGE_BYTES and row.device_bytes == total:
        problems += _replicated(row, mesh, table)
    return row


def _misfit(where: str, letter: str, size: int, mesh: AnyMesh, axes: list[str]):
    ways = math.prod(mesh.shape[a] for a in axes)
    if size % ways == 0:
        return []
    below = size // ways * ways
    sizes = f"{below} or {below + ways}" if below else f"{ways}"
    fits = [d for d in range(1, ways + 1) if size % d == 0 and ways % d == 0]
    names = " * ".join(f"{a}={mesh.shape[a]}" for a in axes)
    return [
        f"{where}: {letter} ({LETTERS[letter]}) = {size} is not a multiple of mesh "
        f"{names}; use {letter}={sizes}, or {'*'.join(axes)} one of {fits}."
    ]


def _misfits_of_dims(dims, mesh) -> list[str]:
    return [
        problem
        for letter, (setting, size) in dims.items()
        for problem in _misfit(
            f"{setting}={size}",
            letter,
            size,
            mesh,
            *axes_by_letter(letter, RESIDUAL, mesh),
        )
    ]


def _misfits_of_spec(path, shape, placed, mesh) -> list[str]:
    if len(placed) > len(shape):
        return [f"{path}: override {placed} has more entries than dims {shape}."]
    problems = []
    used: list[str] = []
    for size, entry in zip(shape, placed, strict=False):
        axes = axes_of_entry(entry)
        if unknown := [a for a in axes if a not in mesh.shape]:
            problems.append(f"{path}: override names unknown mesh axes {unknown}.")
            continue
        if size % math.prod(mesh.shape[a] for a in axes):
            problems.append(f"{path}: override {placed} does not divide {shape}.")
        used += axes
    if len(set(used)) < len(used):
        problems.append(f"{path}: override {placed} uses a mesh axis twice.")
    return problems


def _replicated(row: Row, mesh: AnyMesh, table: Table) -> list[str]:
    storage = {a for axes in table.values() for a in axes if mesh.shape.get(a, 1) > 1}
    able = [
        a for a in sorted(storage) if any(s % mesh.shape[a] == 0 for s in row.shape)
    ]
    if not able:
        return []
    return [
        f"{row.path} {row.letters}={row.shape} would be whole on every device "
        f"({row.total_bytes / 2**20:.1f} MiB) though {able} could cut it; give a rule "
        "to one of its letters."
    ]


def _unused_axes(rows: list[Row], mesh: AnyMesh, table: Table) -> list[str]:
    storage = {a for axes in table.values() for a in axes}
    used = {a for row in rows for entry in row.spec for a in axes_of_entry(entry)}
    return [
        f"mesh axis {axis}={mesh.shape[axis]} cuts no parameter; use {axis}=1."
        for axis in mesh.shape
        if axis in storage and mesh.shape[axis] > 1 and axis not in used
    ]


def _num_shards(placed: jax.P, mesh: AnyMesh) -> int:
    return math.prod(
        mesh.shape.get(a, 1) for entry in placed for a in axes_of_entry(entry)
    )


def _names(path) -> list[str]:
    return _path(path).split("/")


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")

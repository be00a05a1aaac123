# SPDX-License-Identifier: Apache-2.0
"""The communication of a compiled program: read from its HLO, printed as a table.

HLO is the text of `jax.stages.Compiled.as_text()`, for CPUs or GPUs; scheduled HLO
also says what hides behind computation.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jaxllm.inspect.hlo import KINDS, Groups, Module, bytes_of, replica_groups
from sharding.report import format_table


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves arrays between devices."""

    kind: str  # of KINDS
    axes: tuple[str, ...] | None  # of the mesh; None: groups that no axes describe
    group: int  # devices that take part together
    arrays: tuple[str, ...]  # what one device puts in, such as "bf16[128,4096]"
    num_bytes: int  # of these
    count: int | None  # executions a step; None where a loop's length is unknown
    loop: str  # op_name of the innermost loop around it; "" outside
    overlapped: bool  # whether computation is scheduled between its start and its end
    op_name: str  # what asked for it, as a path of scopes
    source: str  # "file:line" of the innermost line outside jax; "" if not recorded

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in one execution by the best ring algorithm."""
        others = self.group - 1
        return {
            "all-gather": self.num_bytes * others,
            "all-reduce": 2 * self.num_bytes * others / self.group,
            "reduce-scatter": self.num_bytes * others / self.group,
            "all-to-all": self.num_bytes * others / self.group,
            "ragged-all-to-all": self.num_bytes * others / self.group,
            "collective-permute": self.num_bytes,
        }[self.kind]

    @property
    def phase(self) -> str:
        """Whether it is part of the "forward" or "backward" pass, or of neither: ""."""
        if "transpose(" in self.op_name:
            return "backward"
        return "forward" if "jvp(" in self.op_name else ""


def read_collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """Returns the collectives of an optimized HLO module, between several devices."""
    module = Module(text)
    groups = _groups_by_axes(mesh)
    found = []
    for instruction in module.instructions:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        members = replica_groups(instruction.rest, mesh)
        group = len(next(iter(members))) if members else mesh.size
        pairs = kind == "collective-permute"
        if group < 2 and not pairs:
            continue
        axes = _permuted_axes(instruction.rest, mesh) if pairs else groups.get(members)
        arrays = module.operand_arrays(instruction)
        count, loop, hidden = module.executions(instruction)
        found.append(
            Collective(
                kind=kind,
                axes=axes,
                group=2 if pairs else group,
                arrays=arrays,
                num_bytes=sum(map(bytes_of, arrays)),
                count=count,
                loop=loop,
                overlapped=hidden,
                op_name=instruction.op_name,
                source=module.source(instruction),
            )
        )
    return found


def bill(collectives: Iterable[Collective]) -> str:
    """Returns a table of collectives, most bytes first, and sums by mesh axis."""
    rows = sorted(collectives, key=lambda c: -c.wire_bytes * (c.count or 1))
    body = [
        [
            c.kind,
            _named(c.axes),
            ", ".join(_counted(c.arrays)),
            "?" if c.count is None else str(c.count),
            _mib(c.wire_bytes),
            _mib(c.wire_bytes * (c.count or 1)),
            c.phase or "-",
            "loop" if c.loop else "-",
            "hidden" if c.overlapped else "exposed",
            c.source or c.op_name,
        ]
        for c in rows
    ]
    header = ["collective", "axes", "arrays of a device", "times", "MiB", "MiB a step"]
    header += ["pass", "in", "time", "asked for by"]
    sums: dict[tuple[str, str], float] = {}
    for c in rows:
        key = (_named(c.axes), "hidden" if c.overlapped else "exposed")
        sums[key] = sums.get(key, 0.0) + c.wire_bytes * (c.count or 1)
    totals = [f"{axes}: {_mib(b)} MiB {when}" for (axes, when), b in sums.items()]
    return "\n".join(
        [format_table("what each device sends in a step", header, body), "", *totals]
    )


def _groups_by_axes(mesh: jax.sharding.Mesh) -> dict[Groups, tuple[str, ...]]:
    """Returns which of the axes larger than 1 make each partition of the devices."""
    shape = tuple(mesh.shape.values())
    places = np.arange(math.prod(shape)).reshape(shape)
    large = [i for i, size in enumerate(shape) if size > 1]
    found = {}
    for number in range(1, len(large) + 1):
        for chosen in itertools.combinations(large, number):
            rest = [i for i in range(len(shape)) if i not in chosen]
            rows = places.transpose([*rest, *chosen]).reshape(
                -1, math.prod(shape[i] for i in chosen)
            )
            groups = frozenset(frozenset(map(int, row)) for row in rows)
            found[groups] = tuple(mesh.axis_names[i] for i in chosen)
    return found


def _permuted_axes(attributes: str, mesh: jax.sharding.Mesh) -> tuple[str, ...] | None:
    """Returns the axes along which the pairs of a permutation differ."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs is None:
        return None
    shape = tuple(mesh.shape.values())
    differ = set()
    for source, end in re.findall(r"(\d+),(\d+)", pairs[1]):
        a, b = (np.unravel_index(int(place), shape) for place in (source, end))
        differ |= {i for i in range(len(shape)) if a[i] != b[i]}
    return tuple(mesh.axis_names[i] for i in sorted(differ))


def _counted(arrays: Sequence[str]) -> list[str]:
    distinct = dict.fromkeys(arrays)
    return [f"{arrays.count(a)} {a}" if arrays.count(a) > 1 else a for a in distinct]


def _named(axes: tuple[str, ...] | None) -> str:
    return "?" if axes is None else " ".join(axes) or "-"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.2f}"

# SPDX-License-Identifier: Apache-2.0
"""The text of a compiled program: its instructions, loops, and lines of source.

HLO is what `jax.stages.Compiled.as_text()` returns. Its grammar is no stable interface:
this is the one file that knows it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import jax
import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# Instructions that take no time worth hiding a collective behind.
_FREE = {
    "bitcast",
    "constant",
    "get-tuple-element",
    "parameter",
    "tuple",
    "copy",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "async-start",
    "async-done",
    "async-update",
} | {kind + end for kind in KINDS for end in ("", "-start", "-done")}
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}

_MOVES = "sharding/arrays.py"
_LIBRARIES = ("site-packages", "/jax/", _MOVES)
_CALLED = (
    r"(?:calls|body|to_apply|(?:branch|called)_computations)=(\{[^}]*\}|%?[\w.-]+)"
)

Groups = frozenset[frozenset[int]]  # of device numbers, by their place in the mesh


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    computation: str
    position: int  # in the order of the computation, which is the schedule
    name: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes
    op_name: str


class Module:
    """The instructions of a module, and who calls which computation."""

    def __init__(self, text: str):
        self.instructions: list[Instruction] = []
        self.types: dict[tuple[str, str], str] = {}
        self.by_computation: dict[str, list[Instruction]] = {}
        self.callers: dict[str, list[Instruction]] = {}
        self.tables = _debug_tables(text)
        for instruction, kind in _read_instructions(text):
            self.instructions.append(instruction)
            self.types[instruction.computation, instruction.name] = kind
            self.by_computation.setdefault(instruction.computation, []).append(
                instruction
            )
            called = r"(?:calls|body|to_apply|branch_computations|called_computations)"
            for names in re.findall(
                called + r"=(\{[^}]*\}|%?[\w.-]+)", instruction.rest
            ):
                for name in re.findall(r"[\w.-]+", names):
                    self.callers.setdefault(name, []).append(instruction)

    def operand_arrays(self, instruction: Instruction) -> tuple[str, ...]:
        """Returns what one device puts in, such as ("bf16[128,4096]",)."""
        types = [
            self.types.get((instruction.computation, name), "")
            for name in instruction.operands
        ]
        found = re.findall(r"([a-z]\w*)\[([\d,]*)\]", " ".join(types))
        return tuple(f"{dtype}[{dims}]" for dtype, dims in found)

    def executions(self, instruction: Instruction) -> tuple[int | None, str, bool]:
        """Returns how often a step runs it, the loop around it, and if it is hidden."""
        hidden = self._is_hidden(instruction)
        count: int | None = 1
        loop, computation = "", instruction.computation
        while computation in self.callers:
            caller = self.callers[computation][0]
            if caller.opcode == "while":
                loop = loop or caller.op_name or caller.name
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', caller.rest)
                count = count * int(trips[1]) if trips and count is not None else None
            elif caller.opcode == "async-start":
                hidden = self._is_hidden(caller)
            computation = caller.computation
        return count, loop, hidden

    def source(self, instruction: Instruction) -> str:
        """Returns the innermost line of the call stack that is not in a library.

        `sharding.arrays` moves what others ask it to: they are named.
        """
        frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        number = int(frame[1]) if frame else 0
        names, places, frames = self.tables
        ours = ""
        while number in frames:
            place, parent = frames[number]
            file, line = places[place]
            path = names[file]
            named = f"{'/'.join(path.split('/')[-2:])}:{line}"
            if not any(part in path for part in _LIBRARIES):
                return named
            ours = ours or (named if _MOVES in path else "")
            number = parent if parent != number else 0
        return ours

    def _is_hidden(self, start: Instruction) -> bool:
        if not start.opcode.endswith("-start"):
            return False
        for later in self.by_computation[start.computation][start.position + 1 :]:
            if later.opcode.endswith("-done") and start.name in later.operands:
                return False
            if later.opcode not in _FREE:
                return True
        return False


def _read_instructions(text: str) -> Iterator[tuple[Instruction, str]]:
    """Yields each instruction and the type of its result."""
    computation, position = "", 0
    pattern = re.compile(
        r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)(?= [\w-]+\()|\S+) "
        r"(?P<opcode>[\w-]+)\((?P<rest>.*)"
    )
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            computation, position = start[1], 0
        elif match := pattern.match(line):
            inside = match["rest"].partition(")")[0]
            name = re.search(r'op_name="([^"]*)"', match["rest"])
            yield (
                Instruction(
                    computation=computation,
                    position=position,
                    name=match["name"],
                    opcode=match["opcode"],
                    operands=tuple(re.findall(r"%([\w.-]+)", inside)),
                    rest=match["rest"],
                    op_name=name[1] if name else "",
                ),
                match["type"],
            )
            position += 1


def _debug_tables(text: str) -> tuple[dict, dict, dict]:
    """Returns file names, lines by location, and (location, parent) by frame."""
    section = re.search(r"^FileNames\n(.*?)\n\n", text, re.M | re.S)
    rows = re.findall(r'^(\d+) "(.*)"$', section[1] if section else "", re.M)
    places = re.findall(r"^(\d+) \{file_name_id=(\d+) .*?line=(\d+)", text, re.M)
    frames = re.findall(
        r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", text, re.M
    )
    return (
        {int(i): name for i, name in rows},
        {int(i): (int(file), int(line)) for i, file, line in places},
        {int(i): (int(place), int(parent or i)) for i, place, parent in frames},
    )


def replica_groups(attributes: str, mesh: jax.sharding.Mesh) -> Groups:
    """Reads the three ways in which XLA writes replica_groups."""
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", match[1])}
        chosen = re.findall(r"'([^']+)'", match[2])
        names = list(sizes)
        places = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        order = [i for i, n in enumerate(names) if n not in chosen]
        order += [names.index(n) for n in chosen]
        rows = places.transpose(order).reshape(-1, math.prod(sizes[n] for n in chosen))
    elif match := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        dims = [int(d) for d in match[2].split(",")]
        places = np.arange(math.prod(dims)).reshape(dims)
        if match[3]:
            places = places.transpose([int(d) for d in match[3].split(",")])
        rows = places.reshape([int(d) for d in match[1].split(",")])
    elif match := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        found = re.findall(r"\{([\d,]+)\}", match[1])
        return frozenset(frozenset(map(int, row.split(","))) for row in found)
    else:
        return frozenset([frozenset(range(mesh.size))])
    return frozenset(frozenset(map(int, row)) for row in rows)


def bytes_of(array: str) -> int:
    """Returns the size of an array written as "bf16[128,4096]"."""
    dtype, _, dims = array.rstrip("]").partition("[")
    bits = _BITS.get(dtype) or int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8

# SPDX-License-Identifier: Apache-2.0
"""What the instructions of a compiled program do, for whoever has timed them."""

import dataclasses
import re
from typing import Literal

from sharding.hlo import KINDS, Instruction, Module

Kind = Literal["matmul", "kernel", "communication", "control", "other"]

_CONTROL = ("while", "conditional", "call")  # what they run is there by itself
_MATMUL = r'"__cublas|"__onednn\$matmul|"__triton_gemm'
_KERNEL = r'"mosaic|"__cudnn\$fmha|"triton_kernel_call|"__gpu\$xla\.gpu\.triton'


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of a program, or the fusion that it became."""

    name: str
    kind: Kind  # "kernel": written by hand, ours or a library's
    op_name: str  # what asked for it, as a path of scopes
    source: str  # "file:line" of the innermost line outside jax; "" if not recorded


def read_operations(text: str) -> dict[str, Operation]:
    """Returns the instructions of an optimized HLO module, by their names."""
    module = Module(text)
    return {
        instruction.name: Operation(
            name=instruction.name,
            kind=_kind(module, instruction),
            op_name=instruction.op_name or _inner_name(module, instruction),
            source=module.source(instruction),
        )
        for instruction in module.instructions
    }


def _kind(module: Module, instruction: Instruction) -> Kind:
    opcode = re.sub("-(start|done|update)$", "", instruction.opcode)
    if opcode in KINDS:
        return "communication"
    if opcode in _CONTROL:
        return "control"
    if opcode in ("dot", "convolution") or re.search(_MATMUL, instruction.rest):
        return "matmul"
    if opcode == "custom-call" and re.search(_KERNEL, instruction.rest):
        return "kernel"
    kinds = {_kind(module, inner) for inner in _inside(module, instruction)}
    for kind in ("communication", "matmul", "kernel"):
        if kind in kinds:
            return kind
    return "other"


def _inner_name(module: Module, instruction: Instruction) -> str:
    """Returns the name of the last instruction inside that has one."""
    inner = _inside(module, instruction)
    names = [i.op_name or _inner_name(module, i) for i in inner]
    return next((name for name in reversed(names) if name), "")


def _inside(module: Module, instruction: Instruction) -> list[Instruction]:
    """Returns the instructions of the computation that a fusion or the like calls."""
    called = re.search(r"\bcalls=%?([\w.-]+)", instruction.rest)
    return module.by_computation.get(called[1], []) if called else []

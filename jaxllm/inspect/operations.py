# SPDX-License-Identifier: Apache-2.0
"""The operations of a compiled program: what each of its instructions does."""

import dataclasses
import re
from typing import Literal

from jaxllm.inspect.hlo import KINDS, Instruction, Module

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
    return {i.name: _describe(module, i) for i in module.instructions}


def _describe(module: Module, instruction: Instruction) -> Operation:
    """Returns what an instruction does: for a fusion, its most expensive part."""
    kind, inner = _work(module, instruction)
    named = next((i for i in (inner, instruction) if i.op_name), None)
    return Operation(
        name=instruction.name,
        kind=kind,
        op_name=named.op_name if named else "",
        source=module.source(inner) or module.source(instruction),
    )


def _work(module: Module, instruction: Instruction) -> tuple[Kind, Instruction]:
    """Returns what kind an instruction is, and which one in it that is because of."""
    opcode = re.sub("-(start|done|update)$", "", instruction.opcode)
    if opcode in KINDS:
        return "communication", instruction
    if opcode in _CONTROL:
        return "control", instruction
    if opcode in ("dot", "convolution") or re.search(_MATMUL, instruction.rest):
        return "matmul", instruction
    if opcode == "custom-call" and re.search(_KERNEL, instruction.rest):
        return "kernel", instruction
    called = re.search(r"\bcalls=%?([\w.-]+)", instruction.rest)
    inside = module.by_computation.get(called[1], []) if called else []
    works = [_work(module, inner) for inner in inside]
    for kind in ("communication", "matmul", "kernel"):
        if found := [inner for each, inner in works if each == kind]:
            return kind, found[0]
    if instruction.op_name:
        return "other", instruction
    named = [inner for _, inner in works if inner.op_name]
    return "other", named[-1] if named else instruction

# SPDX-License-Identifier: Apache-2.0
"""Compiles cases for NVIDIA GPUs on a machine without one.

`python -m pallas_kernels.offline attention [part of a case's name]` prints registers,
spills, shared memory and tensor-core instructions of each kernel. It needs the CUDA
plugin of jax, `ptxas`, libdevice and `nvdisasm`, but no driver and no GPU:
`make .venv/cuda` puts them where `toolchain` looks.
"""

import sys
from collections.abc import Sequence

from pallas_kernels.case import OPERATIONS, find_cases
from pallas_kernels.offline.compile import (
    compile_case,
    compile_in_subprocess,
    format_resources,
)


def main(arguments: Sequence[str]) -> int:
    """Prints the table of the cases asked for; the exit status is 1 if one failed."""
    if arguments[:1] == ["--child"]:
        operation, name, *which = arguments[1:]
        case = next(c for c in find_cases(operation) if c.name == name)
        candidate = (int(which[0]), int(which[1])) if which else None
        compile_case(case, candidate=candidate)
        return 0
    operations = [arguments[0]] if arguments else list(OPERATIONS)
    part = arguments[1] if len(arguments) > 1 else ""
    rows, failed = [], False
    for operation in operations:
        for case in find_cases(operation, part):
            compiled = compile_in_subprocess(operation, case.name)
            rows += [(case, resources) for resources in compiled.kernels]
            if compiled.status:
                failed = True
                print(f"{operation} {case.name}: {compiled.output[-2000:]}")
    print(format_resources(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

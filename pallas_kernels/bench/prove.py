# SPDX-License-Identifier: Apache-2.0
"""Checks one case on this device, in a process of its own; prints a line of JSON.

python -m pallas_kernels.bench.prove OPERATION NAME [--dry]
"""

import contextlib
import json
import secrets
import sys
from collections.abc import Sequence

import jax
import numpy as np

from pallas_kernels import mosaic
from pallas_kernels.bench import check
from pallas_kernels.bench.record import Record
from pallas_kernels.bench.worker import find_cases
from pallas_kernels.case import Case


def prove(case: Case, dry: bool = False) -> Record:
    """Returns errors, a verdict, and whether two runs gave the same bits."""
    with mosaic.interpret() if dry else contextlib.nullcontext():
        seed = secrets.randbits(31)
        inputs = jax.jit(case.make_inputs)(jax.random.key(seed))
        expected = check.compile_reference(case)(*inputs)
        found, outputs = {}, {}
        for name in ("mosaic", "xla"):
            if name not in case.functions:
                continue
            program = jax.jit(case.functions[name])
            try:
                runs = [
                    check.poisoned(lambda run=program: run(*inputs), case.num_bytes)
                    for _ in range(2)
                ]
            except jax.errors.JaxRuntimeError as error:
                if name == "xla" and "RESOURCE_EXHAUSTED" in str(error):
                    continue  # too large for plain JAX: the bound is a constant then
                raise
            outputs[name] = runs
            found[name] = check.errors(runs[0], expected)
    return {
        "name": case.name,
        "seed": seed,
        "errors": found,
        "verdict": check.verdict(case, found),
        "same_bits": {name: _same_bits(*runs) for name, runs in outputs.items()},
    }


def _same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(_bits(x), _bits(y)) for x, y in pairs)


def _bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


def main(arguments: Sequence[str]) -> None:
    operation, name, *dry = arguments
    case = next(c for c in find_cases(operation, bool(dry)) if c.name == name)
    print(json.dumps(prove(case, bool(dry))))


if __name__ == "__main__":
    main(sys.argv[1:])

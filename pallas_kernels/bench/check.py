# SPDX-License-Identifier: Apache-2.0
"""Whether a kernel computes what its reference says, at real shapes on the device.

python -m pallas_kernels.bench.check OPERATION NAME [--dry]

checks one case, in a process of its own, and prints a line of JSON.

The rule of FlashAttention's tests: against a reference of higher precision, on the same
rounded inputs, an error of at most twice that of plain JAX in bfloat16, three times in
a backward pass.
"""

import contextlib
import json
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import mosaic
from pallas_kernels.bench.record import Record
from pallas_kernels.case import Case, find_cases

FACTORS = {"forward": 2.0, "backward": 3.0}
LEAST_ERROR = 1e-5  # of float32 sums in another order
ERROR_WITHOUT_XLA = 1e-2  # of bfloat16, where plain JAX does not fit into memory


def prove(case: Case, dry: bool = False) -> Record:
    """Returns errors, a verdict, and whether two runs gave the same bits."""
    with mosaic.interpret() if dry else contextlib.nullcontext():
        seed = secrets.randbits(31)
        inputs = jax.jit(case.make_inputs)(jax.random.key(seed))
        expected = compile_reference(case)(*inputs)
        found, outputs = {}, {}
        for name in ("mosaic", "xla"):
            if name not in case.functions:
                continue
            program = jax.jit(case.functions[name])
            try:
                runs = [
                    poisoned(lambda run=program: run(*inputs), case.num_bytes)
                    for _ in range(2)
                ]
            except jax.errors.JaxRuntimeError as error:
                if name == "xla" and "RESOURCE_EXHAUSTED" in str(error):
                    continue  # too large for plain JAX: the bound is a constant then
                raise
            outputs[name] = runs
            found[name] = errors(runs[0], expected)
    return {
        "name": case.name,
        "seed": seed,
        "errors": found,
        "verdict": verdict(case, found),
        "same_bits": {name: _same_bits(*runs) for name, runs in outputs.items()},
    }


def compile_reference(case: Case) -> Callable[..., list[jax.Array]]:
    """Returns a program of what the case's reference says, of float32 inputs.

    The device multiplies float32 as TF32 unless told not to.
    """
    function = case.reference or case.functions["xla"]

    def exact(*inputs):
        return jax.tree.leaves(function(*jax.tree.map(_widened, inputs)))

    # It runs once: to try which of many GEMMs is fastest would take longer.
    on_gpu = jax.default_backend() == "gpu"
    options = {"xla_gpu_autotune_level": 0} if on_gpu else {}
    with jax.default_matmul_precision("highest"):
        return jax.jit(exact, compiler_options=options).lower(*case.inputs).compile()


def errors(outputs: Any, expected: list[jax.Array]) -> list[float]:
    """Returns ||x - expected|| / ||expected|| of each output; NaN where one is NaN.

    An infinity is right where the reference has the same one, and wrong elsewhere.
    """
    leaves = jax.tree.leaves(outputs)
    if len(leaves) != len(expected):
        raise ValueError(
            f"a case has {len(leaves)} outputs and its reference {len(expected)}: both "
            "must return the same tree."
        )
    return [float(_error(x, y)) for x, y in zip(leaves, expected, strict=True)]


def verdict(case: Case, found: Mapping[str, list[float]]) -> dict[str, str]:
    """Returns "right" or what is wrong, for each implementation but plain JAX's.

    Args:
      case: its name tells a backward pass.
      found: `errors` by implementation.
    """
    factor = FACTORS["backward" if "backward" in case.name else "forward"]
    bounds = None
    if "xla" in found:
        bounds = [factor * error + LEAST_ERROR for error in found["xla"]]
    said = {}
    for name, values in found.items():
        if name == "xla":
            continue
        limits = bounds or [ERROR_WITHOUT_XLA] * len(values)
        wrong = [
            f"output {i}: error {error:.1e} above {limit:.1e}"
            for i, (error, limit) in enumerate(zip(values, limits, strict=True))
            if not error <= limit  # a NaN is not
        ]
        said[name] = "; ".join(wrong) or "right"
    return said


def poisoned(function: Callable[[], Any], num_bytes: float) -> Any:
    """Returns function(), whose outputs most likely lie where NaNs were just before.

    A kernel that leaves a part of its output unwritten shows by that.
    """
    size = max(int(num_bytes) // 4, 1)
    jax.block_until_ready(jnp.full(size, jnp.nan, jnp.float32))
    return jax.block_until_ready(function())


def _widened(x: jax.Array) -> jax.Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float32) if floating else x


@jax.jit
def _error(x: jax.Array, expected: jax.Array) -> jax.Array:
    x, expected = x.astype(jnp.float32), expected.astype(jnp.float32)
    same = (x == expected) & jnp.isinf(expected)
    difference = jnp.where(same, 0.0, x - expected)
    size = jnp.where(jnp.isinf(expected), 0.0, expected)
    return jnp.linalg.norm(difference) / jnp.maximum(jnp.linalg.norm(size), 1e-30)


def _same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(_bits(x), _bits(y)) for x, y in pairs)


def _bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


def main(arguments: Sequence[str]) -> None:
    operation, name, *dry = arguments
    cases = find_cases(operation, tiny=bool(dry))
    case = next(case for case in cases if case.name == name)
    print(json.dumps(prove(case, bool(dry))))


if __name__ == "__main__":
    main(sys.argv[1:])

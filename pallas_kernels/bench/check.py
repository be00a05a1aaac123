# SPDX-License-Identifier: Apache-2.0
"""Whether a kernel computes what its reference says, at real shapes on the device.

The rule of FlashAttention's tests: against a reference of higher precision, on the same
rounded inputs, an error of at most twice that of plain JAX in bfloat16, three times in
a backward pass.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case

FACTORS = {"forward": 2.0, "backward": 3.0}
LEAST_ERROR = 1e-5  # of float32 sums in another order
ERROR_WITHOUT_XLA = 1e-2  # of bfloat16, where plain JAX does not fit into memory


def compile_reference(case: Case) -> Callable[..., list[jax.Array]]:
    """Returns a program of what the case's reference says, of float32 inputs.

    The device multiplies float32 as TF32 unless told not to.
    """
    function = case.reference or case.functions["xla"]

    def run(*inputs):
        return jax.tree.leaves(function(*jax.tree.map(_widened, inputs)))

    # It runs once: to try which of many GEMMs is fastest would take longer.
    on_gpu = jax.default_backend() == "gpu"
    options = {"xla_gpu_autotune_level": 0} if on_gpu else {}
    with jax.default_matmul_precision("highest"):
        return jax.jit(run, compiler_options=options).lower(*case.inputs).compile()


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

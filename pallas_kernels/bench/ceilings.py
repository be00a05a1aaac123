# SPDX-License-Identifier: Apache-2.0
"""What the device can do at best: measured once a run, to hold the kernels against."""

import dataclasses
import time

import jax
import jax.numpy as jnp

from pallas_kernels.bench.timing import Entrant, time_in_turns


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates of one device, measured in one run."""

    flops_per_s: float  # a large bfloat16 product of random matrices
    bytes_per_s: float  # a large copy or loop, bytes read and written
    launch_s: float  # from one tiny program to the next: no call takes less

    def share(self, flops: float, num_bytes: float, seconds: float) -> float:
        """Returns the part of the nearer ceiling that a call reaches."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s) / seconds


def measure_ceilings(width: int = 8192, copied_bytes: int = 2**32) -> Ceilings:
    """Returns the rates of JAX's default device.

    Args:
      width: of the square matrices. Zeros would multiply faster than random numbers.
      copied_bytes: of the buffer that is read, and of the one that is written.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(key, (width, width), jnp.bfloat16) for key in keys[:2])
    x = jax.random.normal(keys[2], (copied_bytes // 4,), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    copy = jax.jit(jnp.copy)
    negate = jax.jit(jnp.negative)
    one = jnp.zeros(())
    entrants = {
        "multiply": Entrant(lambda i: multiply(a, b), jax.block_until_ready),
        # XLA's copy is the driver's; its loops are slow but of 4 bytes an element.
        "copy": Entrant(lambda i: copy(x), jax.block_until_ready),
        "negate": Entrant(lambda i: negate(x), jax.block_until_ready),
        "launch": Entrant(lambda i: copy(one), jax.block_until_ready),
    }
    until = time.perf_counter() + 5
    found = time_in_turns(entrants, rounds=7, until=until)
    fastest_s = min(found["copy"].median_s, found["negate"].median_s)
    return Ceilings(
        flops_per_s=2 * width**3 / found["multiply"].median_s,
        bytes_per_s=2 * copied_bytes / fastest_s,
        launch_s=found["launch"].median_s,
    )

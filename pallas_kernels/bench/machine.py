# SPDX-License-Identifier: Apache-2.0
"""Which device, driver and libraries these are, and what the device can do at best.

python -m pallas_kernels.bench.machine OPTIONS

A process of its own, as `worker`: writes machine.json and ceilings.json.
"""

import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.bench import peers
from pallas_kernels.bench.options import Options
from pallas_kernels.bench.timing import Entrant, time_in_turns
from pallas_kernels.case import draw_normal


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
    a, b = (draw_normal(key, (width, width), jnp.bfloat16) for key in keys[:2])
    x = draw_normal(keys[2], (copied_bytes // 4,), jnp.float32)
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


def describe() -> dict[str, str]:
    """Returns the names and versions that a result is only worth with."""
    device = jax.devices()[0]
    found = {
        "device": device.device_kind,
        "driver": _driver(),
        "host": f"{platform.machine()}, Python {platform.python_version()}",
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "runtime": device.client.platform_version.replace("\n", " "),
    }
    return found | peers.versions()


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none"
    query = "--query-gpu=name,driver_version,clocks.max.sm,power.limit"
    ended = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True
    )
    return ended.stdout.strip() or "nvidia-smi said nothing"


def main(arguments: list[str]) -> None:
    options = Options.loads(arguments[0])
    folder = Path(options.folder)
    sizes = dict(width=64, copied_bytes=2**16) if options.dry else {}
    ceilings = dataclasses.asdict(measure_ceilings(**sizes))
    (folder / "ceilings.json").write_text(json.dumps(ceilings))
    (folder / "machine.json").write_text(json.dumps(describe()))


if __name__ == "__main__":
    main(sys.argv[1:])

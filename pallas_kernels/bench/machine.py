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
from pathlib import Path

import jax

from pallas_kernels.bench import peers
from pallas_kernels.bench.ceilings import measure_ceilings
from pallas_kernels.bench.options import Options


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

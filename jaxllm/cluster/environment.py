# SPDX-License-Identifier: Apache-2.0
"""The XLA flags and environment variables that a run on GPUs sets, and why.

XLA reads them once, when JAX first looks for devices. A value set by the user is kept.
"""

import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from jaxllm.errors import InputError

XLA_FLAGS = "XLA_FLAGS"
_PROBE = "import jax; jax.devices()"


@dataclasses.dataclass(frozen=True)
class GpuSetting:
    """A flag of XLA, or a variable of the environment."""

    name: str
    value: str
    why: str
    instead: str = ""  # an alias; setting both is an error


_FLAGS = (
    GpuSetting(
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "communicates while it computes; without it no gather of a layer's weights is "
        "hidden",
    ),
    GpuSetting(
        "xla_gpu_first_collective_call_warn_stuck_timeout_seconds",
        "60",
        "as the next one: what is usual is no warning",
    ),
    GpuSetting(
        "xla_gpu_first_collective_call_terminate_timeout_seconds",
        "600",
        "aborts after 40 s by default, while another process may still compile",
    ),
)
# By version of jaxlib: a flag that it does not know ends the process.
FLAGS: Mapping[str, tuple[GpuSetting, ...]] = {"0.11": _FLAGS, "0.12": _FLAGS}
VARIABLES = (
    GpuSetting(
        "XLA_CLIENT_MEM_FRACTION",
        "0.9",
        "of a GPU's memory for arrays; 0.75 by default, and NCCL and CUDA need little",
        instead="XLA_PYTHON_CLIENT_MEM_FRACTION",
    ),
    GpuSetting("NCCL_DEBUG", "WARN", "NCCL says why a connection failed"),
)


def prepare_gpus(environment: MutableMapping[str, str], *, gpus: bool) -> None:
    """Checks the flags that the user set, and adds ours if GPUs will be used.

    Must be called before JAX first looks for devices.

    Raises:
      InputError: XLA_FLAGS has a flag unknown to this jaxlib, or an invalid value.
    """
    if given := environment.get(XLA_FLAGS):
        _check(given)
    if not gpus:
        return
    added = [
        f"--{flag.name}={flag.value}"
        for flag in FLAGS.get(_version(), ())
        if not re.search(rf"--{flag.name}\b", given or "")
    ]
    environment[XLA_FLAGS] = " ".join([given, *added] if given else added)
    for variable in VARIABLES:
        if not (variable.instead and variable.instead in environment):
            environment.setdefault(variable.name, variable.value)


def has_gpus(platforms: str | None, devices: Path = Path("/dev")) -> bool:
    """Returns whether JAX will look for NVIDIA GPUs and the machine has one.

    Args:
      platforms: `jax.config.jax_platforms`.
    """
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return False
    return any(devices.glob("nvidia[0-9]*"))


def describe_flags(environment: Mapping[str, str]) -> str:
    """Returns the flags and variables that are set, as lines of the report."""
    names = (XLA_FLAGS, *(v.name for v in VARIABLES), *(v.instead for v in VARIABLES))
    return "".join(
        f"\n{name:<16} {environment[name]}" for name in names if environment.get(name)
    )


def _version() -> str:
    return ".".join(importlib.metadata.version("jaxlib").split(".")[:2])


def _check(flags: str) -> None:
    """Parses flags in a subprocess, because XLA aborts on an invalid one."""
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE],
        env={**os.environ, XLA_FLAGS: flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if probe.returncode == 0:
        return
    jaxlib_version = f"jaxlib {importlib.metadata.version('jaxlib')}"
    if unknown := re.search(r"Unknown flags? in XLA_FLAGS: (.*)", probe.stderr):
        raise InputError(
            f"XLA_FLAGS has {unknown[1].strip()}, which {jaxlib_version} does not "
            "know; correct the name or leave it out."
        )
    raise InputError(
        f"XLA_FLAGS={flags!r} cannot be read by {jaxlib_version}: a value in it is not "
        "of its flag's type; correct it or leave it out."
    )

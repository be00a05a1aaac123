# SPDX-License-Identifier: Apache-2.0
"""The devices of a process: those that it was given, and those that JAX finds."""

import collections
import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxllm.cluster.environment import has_gpus
from jaxllm.cluster.launch import Launch
from jaxllm.errors import InputError

_REMEDY = (
    "see what nvidia-smi says, install jaxllm[cuda12], or set JAX_PLATFORMS=cpu if the "
    "CPU is meant"
)


def find_devices(platforms: str | None, nodes: Path = Path("/dev")) -> list[Any]:
    """Returns the devices of all processes; the CPU only where it was meant.

    JAX by itself falls back to the CPU, where a run takes a hundred times as long.

    Args:
      platforms: `jax.config.jax_platforms`.
      nodes: where the machine lists its devices.

    Raises:
      InputError: JAX finds no device, or leaves a GPU or the plugin for one unused.
    """
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:
        # It asserts without a word where CUDA was asked for and no GPU is there.
        why = str(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        raise InputError(
            f"JAX_PLATFORMS={platforms or ''}: JAX finds no device: "
            f"{why or 'no GPU is visible'}; {_REMEDY}."
        ) from error
    unused = _unused(nodes) if not platforms and found[0].platform == "cpu" else ""
    if unused:
        raise InputError(
            f"JAX_PLATFORMS is not set, and JAX uses the CPU, although {unused}; "
            f"{_REMEDY}."
        )
    return found


def _unused(nodes: Path) -> str:
    """Returns the GPU, or the plugin for one, that this machine has; or nothing."""
    if has_gpus(None, nodes):
        return "this machine has an NVIDIA GPU"
    if plugins := _plugins():
        return f"its plugin {plugins[0]} is installed"
    return ""


def _plugins() -> list[str]:
    """Returns the plugins of JAX, found as JAX does: as modules, or as entry points."""
    spec = importlib.util.find_spec("jax_plugins")
    folders = spec.submodule_search_locations if spec else None
    found = [f"jax_plugins.{each.name}" for each in pkgutil.iter_modules(folders or [])]
    points = importlib.metadata.entry_points(group="jax_plugins")
    return sorted({*found, *(point.value for point in points)})


def local_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Returns the local ids of this process's devices; [] means all that it sees.

    JAX by itself would take only device SLURM_LOCALID: one of eight GPUs if a node has
    one process, and a missing one if SLURM shows each process only its own GPU.

    Raises:
      InputError: the processes of a node cannot share its GPUs evenly.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None  # JAX reads it
    counts = _expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    num_here = counts[int(environment.get("SLURM_NODEID", "0"))]
    visible = _visible_gpus(environment)
    if num_here == 1 or visible == 1:
        return []
    local_id = int(environment["SLURM_LOCALID"])
    if visible is None:
        return [local_id]  # as JAX does: SLURM gives no GPU information here
    share, rest = divmod(visible, num_here)
    if rest or not share:
        raise InputError(
            f"SLURM started {num_here} processes on a node where they see "
            f"{visible} GPUs, which they cannot share evenly; ask for one "
            "process a node, or one a GPU."
        )
    return list(range(local_id * share, (local_id + 1) * share))


def check_devices(
    launch: Launch | None, environment: Mapping[str, str], devices: Sequence[Any]
) -> None:
    """Checks that all processes are present, each with the devices allocated to it.

    Args:
      devices: of all processes; only `process_index` and `platform` are read.

    Raises:
      InputError: on every process, with the expected and the found devices.
    """
    num_processes = launch.num_processes if launch else 1
    numbers = collections.Counter(device.process_index for device in devices)
    found = [numbers[i] for i in range(max(num_processes, max(numbers) + 1))]
    each, platform = _given_gpus(environment), devices[0].platform
    if platform != "gpu" and each and "cpu" in environment.get("JAX_PLATFORMS", ""):
        each = None  # a run on CPUs may have GPUs allocated
    wanted = max(found) if each is None else each
    if each and platform != "gpu":
        hint = "JAX has no CUDA here: install jaxllm[cuda12], or set JAX_PLATFORMS=cpu"
    elif set(found) == {wanted} and len(found) == num_processes:
        return
    else:
        hint = "give each process as many, and see what nvidia-smi says on its node"
    noun = "process" if num_processes == 1 else "processes"
    kind = "GPUs" if each else platform
    counts = " + ".join(str(number) for number in found)
    raise InputError(
        f"expected {num_processes} {noun} x {wanted} {kind}, found "
        f"{counts} {platform}, by process; {hint}."
    )


def _visible_gpus(environment: Mapping[str, str]) -> int | None:
    """Returns the number of GPUs visible to a process, or None if it is not set."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return None if visible is None else len([v for v in visible.split(",") if v])


def _given_gpus(environment: Mapping[str, str]) -> int | None:
    """Returns the number of GPUs that SLURM allocated to this process, if known."""
    if "SLURM_PROCID" not in environment:
        return None
    chosen = local_devices(environment)
    return len(chosen) if chosen else _visible_gpus(environment)


def _expand_counts(text: str) -> list[int]:
    """Reads SLURM's "2(x3),1" as [2, 2, 2, 1]."""
    counts = []
    for count, _, times in (part.partition("(x") for part in text.split(",")):
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts

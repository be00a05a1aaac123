# SPDX-License-Identifier: Apache-2.0
"""The launch of this process: by SLURM, by hand, or alone."""

import collections
import dataclasses
import ipaddress
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.errors import InputError

# Set these to start processes by hand; under SLURM its own variables are read.
COORDINATOR = "JAXLLM_COORDINATOR"  # host:port of process 0
NUM_PROCESSES = "JAXLLM_NUM_PROCESSES"
PROCESS_ID = "JAXLLM_PROCESS_ID"
_BY_HAND = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)


@dataclasses.dataclass(frozen=True)
class Launch:
    """The address and the numbers with which this process joins the others."""

    coordinator: str  # host:port
    num_processes: int
    process_id: int


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """Returns how this process was launched, or None if the run has no other process.

    Raises:
      InputError: the environment names other processes, but not how to reach them.
    """
    if given := [name for name in _BY_HAND if name in environment]:
        return _by_hand(environment, given)
    num_tasks = int(environment.get("SLURM_NTASKS", "1"))
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", num_tasks))
        if num_tasks == 1:
            return None
        host = _first_host(environment["SLURM_STEP_NODELIST"])
        # Two steps of a job must not meet: each has its own port.
        job, step = (int(environment[f"SLURM_{n}_ID"]) for n in ("JOB", "STEP"))
        port = 61440 + (job * 16 + step) % 4096
        return Launch(f"{host}:{port}", num_tasks, int(environment["SLURM_PROCID"]))
    if num_tasks > 1:
        raise InputError(
            f"SLURM_NTASKS={num_tasks}, but this process was started without srun and "
            "would be alone; start it as `srun python -m jaxllm.train ...`."
        )
    return None


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


def check_host_name(environment: Mapping[str, str], name: str) -> None:
    """Checks that this node's name resolves to an address that other nodes can reach.

    On CPUs, gloo announces that name. Debian maps it to 127.0.1.1, a loopback address.

    Raises:
      InputError: the name resolves to a loopback address, or not at all.
    """
    several = int(environment.get("SLURM_STEP_NUM_NODES", "1")) > 1
    if not several or environment.get("SLURMD_NODENAME") != name:
        return
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise InputError(f"The name of this node, {name}, has no address.") from error
    if ipaddress.ip_address(address).is_loopback:
        raise InputError(
            f"The name of this node, {name}, is {address} on it, where other nodes "
            f"cannot reach it; give {name} its address of the network in /etc/hosts."
        )


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


def _by_hand(environment: Mapping[str, str], given: list[str]) -> Launch | None:
    if missing := [name for name in _BY_HAND if name not in environment]:
        raise InputError(
            f"{given[0]} is set and {' and '.join(missing)} not; set all three for "
            "each of several processes, or none."
        )
    try:
        number, index = (int(environment[name]) for name in _BY_HAND[1:])
    except ValueError as error:
        raise InputError(f"{NUM_PROCESSES} and {PROCESS_ID}: {error}.") from error
    if not 0 <= index < number:
        raise InputError(
            f"{PROCESS_ID}={index} must be from 0 to {NUM_PROCESSES}={number} less 1."
        )
    return Launch(environment[COORDINATOR], number, index) if number > 1 else None


def _first_host(nodes: str) -> str:
    """Returns the first host of "node[1-3],other"; scontrol expands the brackets."""
    if "[" not in nodes:
        return nodes.partition(",")[0]
    names = subprocess.run(
        ["scontrol", "show", "hostnames", nodes],
        capture_output=True,
        text=True,
        check=True,
    )
    return names.stdout.split()[0]


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

# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how they find each other, and how they agree.

One process leads: it alone writes what is not a part of a global array. Alone, a
process leads itself, and all of this is free.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.config import DistributedConfig, InputError

# How to start processes by hand; SLURM's own variables need no help.
COORDINATOR = "JAXLLM_COORDINATOR"  # host:port of process 0
NUM_PROCESSES = "JAXLLM_NUM_PROCESSES"
PROCESS_ID = "JAXLLM_PROCESS_ID"
_BY_HAND = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
_MESSAGE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process was started beside others."""

    coordinator: str  # host:port
    num_processes: int
    process_id: int


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """Returns how this process was started, or None if it is alone.

    Raises:
      InputError: the environment says that there are others, but not how to meet them.
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


def join(config: DistributedConfig) -> None:
    """Joins the other processes of the run, if any; before a device is used.

    Raises:
      InputError: see `find_launch`.
    """
    launch = find_launch(os.environ)
    if launch is None or jax.distributed.is_initialized():
        return
    jax.distributed.initialize(
        launch.coordinator,
        launch.num_processes,
        launch.process_id,
        local_device_ids=local_devices(os.environ),
        initialization_timeout=config.start_timeout_s,
        heartbeat_timeout_seconds=config.heartbeat_timeout_s,
    )


def describe() -> str:
    """Returns how many processes and devices take part, as a line of the report."""
    device, number = jax.devices()[0], jax.process_count()
    processes = f"{number} processes" if number > 1 else "1 process"
    return f"{'devices':<16} {jax.device_count()} {device.device_kind} in {processes}"


def is_lead() -> bool:
    """Returns whether this process writes for all."""
    return jax.process_index() == 0


def on_lead(action: Callable[[], Any]) -> None:
    """Runs action on the leading process; no process goes on before it is done.

    Raises:
      InputError: on every process, with the leading one's message.
    """
    error = None
    if is_lead():
        try:
            action()
        except Exception as caught:
            if jax.process_count() == 1:
                raise
            error = caught
    if jax.process_count() == 1:
        return
    message = _broadcast_text(str(error) if error is not None else "")
    if error is not None:
        raise error
    if message:
        raise InputError(message)


def of_lead(number: int) -> int:
    """Returns the leading process's number on every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


def leave(status: int) -> NoReturn:
    """Exits after an error, without waiting for processes that may be stuck.

    Python's ordinary exit waits for all to come to JAX's last barrier, and is aborted
    there once `heartbeat_timeout_s` have passed.
    """
    if not jax.distributed.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Poll:
    """Asks every process a yes-or-no question once a step, without waiting for it.

    The answer is that of the step before: it comes with that step's own results. Every
    process gets the same one at the same step.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._pending: jax.Array | None = None
        self._alone = jax.process_count() == 1
        if self._alone:
            return
        place = jax.NamedSharding(mesh, jax.P(mesh.axis_names))

        def votes(value: int) -> jax.Array:
            part = np.full(mesh.size, value, np.int32)
            return jax.make_array_from_callback(part.shape, place, lambda i: part[i])

        self._votes = {False: votes(0), True: votes(1)}
        add = jax.jit(lambda v: v.sum(), out_shardings=jax.NamedSharding(mesh, jax.P()))
        with jax.set_mesh(mesh):
            self._add = add.lower(self._votes[False]).compile()

    def __call__(self, answer: bool) -> bool:
        """Returns whether any process said yes."""
        if self._alone:
            return answer
        before, self._pending = self._pending, self._add(self._votes[answer])
        return before is not None and int(jax.device_get(before)) > 0


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
    """Returns the first of SLURM's "node[1-3],other"; brackets are read by SLURM."""
    if "[" not in nodes:
        return nodes.partition(",")[0]
    names = subprocess.run(
        ["scontrol", "show", "hostnames", nodes],
        capture_output=True,
        text=True,
        check=True,
    )
    return names.stdout.split()[0]


def local_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Returns the numbers of this process's devices; [] is JAX's word for all it sees.

    JAX alone would take the one numbered SLURM_LOCALID: one of eight where a node has
    one process, and one that is not there where SLURM shows each process its own.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None  # JAX reads it
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    counts = _expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    num_here = counts[int(environment.get("SLURM_NODEID", "0"))]
    if num_here == 1 or len(visible) == 1:
        return []
    share, rest = divmod(len(visible), num_here)
    if rest or not share:
        raise InputError(
            f"SLURM started {num_here} processes on a node where they see "
            f"{len(visible)} GPUs, which they cannot share evenly; ask for one "
            "process a node, or one a GPU."
        )
    first = int(environment["SLURM_LOCALID"]) * share
    return list(range(first, first + share))


def _expand_counts(text: str) -> list[int]:
    """Reads SLURM's "2(x3),1" as [2, 2, 2, 1]."""
    counts = []
    for count, _, times in (part.partition("(x") for part in text.split(",")):
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def _broadcast_text(text: str) -> str:
    data = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = text.encode()[:_MESSAGE_BYTES]
    data[: len(encoded)] = list(encoded)
    received = np.asarray(multihost_utils.broadcast_one_to_all(data))
    return bytes(received).rstrip(b"\0").decode(errors="replace")

# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how they find each other, and how they agree.

One process leads: it alone writes what is not a part of a global array. Alone, a
process leads itself, and all of this is free.
"""

import os
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.config import DistributedConfig, InputError
from jaxllm.gpuflags import describe_flags
from jaxllm.launch import check_devices, check_host_name, find_launch, local_devices

_MESSAGE_BYTES = 4096


def join(config: DistributedConfig) -> None:
    """Joins the other processes of the run, if any; before a device is used.

    Raises:
      InputError: see `jaxllm.launch`.
    """
    launch = find_launch(os.environ)
    if jax.distributed.is_initialized():
        return
    if launch is not None:
        if jax.config.jax_platforms == "cpu":
            check_host_name(os.environ, socket.gethostname())
        # Its handler would take SIGTERM away from `resilience.preemption`.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            launch.coordinator,
            launch.num_processes,
            launch.process_id,
            local_device_ids=local_devices(os.environ),
            initialization_timeout=config.start_timeout_s,
            heartbeat_timeout_seconds=config.heartbeat_timeout_s,
        )
    check_devices(launch, os.environ, jax.devices())


def describe() -> str:
    """Returns what takes part and how it is set up, as lines of the report."""
    device, number = jax.devices()[0], jax.process_count()
    processes = f"{number} processes" if number > 1 else "1 process"
    devices = f"{jax.device_count()} {device.device_kind} in {processes}"
    return f"{'devices':<16} {devices}{describe_flags(os.environ)}"


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


def _broadcast_text(text: str) -> str:
    data = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = text.encode()[:_MESSAGE_BYTES]
    data[: len(encoded)] = list(encoded)
    received = np.asarray(multihost_utils.broadcast_one_to_all(data))
    return bytes(received).rstrip(b"\0").decode(errors="replace")

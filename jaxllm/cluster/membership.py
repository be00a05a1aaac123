# SPDX-License-Identifier: Apache-2.0
"""Joins this process to the others of its run, starts its watchdog, and leaves."""

import os
import socket
import sys
import threading
from pathlib import Path
from typing import NoReturn

import jax

from jaxllm.cluster.aborts import delay_aborts
from jaxllm.cluster.agreement import is_lead, text_of_lead
from jaxllm.cluster.launch import (
    Launch,
    check_devices,
    check_host_name,
    find_launch,
    local_devices,
)
from jaxllm.cluster.limits import Limits
from jaxllm.cluster.peers import Meeting, Peers, come
from jaxllm.cluster.phases import Phases
from jaxllm.cluster.watchdog import Watchdog
from jaxllm.config import DistributedConfig
from jaxllm.errors import RESUMABLE

_LATER = 3  # factor on our timeouts, for JAX, which aborts: ours must come first

_watchdog: Watchdog | None = None  # of this process


def join(config: DistributedConfig, phases: Phases | None = None) -> None:
    """Joins the other processes of the run, if any; call it before using a device.

    It starts a watchdog, which ends this process with 75 if another one dies, or if a
    phase of any process exceeds its limit.

    Raises:
      InputError: see `jaxllm.cluster.launch`.
    """
    global _watchdog
    launch, peers = find_launch(os.environ), None
    if jax.distributed.is_initialized():
        return
    if launch is not None:
        if jax.config.jax_platforms == "cpu":
            check_host_name(os.environ, socket.gethostname())
        peers = _meet(launch, config)
    limits = None if phases is None else Limits(phases, config.stall_timeout_s)
    _watchdog = Watchdog(limits, config.heartbeat_timeout_s, peers=peers)
    _watchdog.start()
    check_devices(launch, os.environ, jax.devices())


def write_stacks_to(workdir: Path) -> None:
    """Sets the directory for the stacks of all threads, written if the run hangs."""
    if _watchdog is not None:
        _watchdog.workdir = workdir


def hear_others() -> None:
    """Waits a moment before an error is printed: another process may be its cause.

    If so, this does not return: the watchdog reports the cause and ends this process.
    """
    if _watchdog is not None and jax.distributed.is_initialized():
        _watchdog.hear()


def leave(status: int, why: str = "") -> NoReturn:
    """Exits; with a reason for an error, so that the other processes end too.

    Python's ordinary exit would wait for all of them at JAX's last barrier, and be
    aborted there after a while if one of them cannot reach it.
    """
    if not jax.distributed.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    if _watchdog is None:  # the processes are not connected
        os._exit(status)
    _watchdog.leave(status, why)


def _meet(launch: Launch, config: DistributedConfig) -> Peers:
    """Joins the other processes in JAX, and connects all watchdogs."""
    delay_aborts()
    limit_s = config.start_timeout_s
    why = f"config.distributed.start_timeout_s={limit_s} have passed"
    give_up = threading.Timer(limit_s, _give_up, (launch, why))
    give_up.daemon = True
    give_up.start()
    # Its handler would take SIGTERM away from `cluster.preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.num_processes,
            launch.process_id,
            local_device_ids=local_devices(os.environ),
            initialization_timeout=_LATER * limit_s,
            heartbeat_timeout_seconds=_LATER * config.heartbeat_timeout_s,
        )
        meeting = Meeting() if is_lead() else None
        invitation = text_of_lead(meeting.invitation if meeting else "")
        if meeting is not None:
            return meeting.gather(launch.num_processes, limit_s)
        host = launch.coordinator.rpartition(":")[0].strip("[]")
        return come(invitation, host, launch.process_id, limit_s)
    except (jax.errors.JaxRuntimeError, OSError) as error:
        _give_up(launch, f"{type(error).__name__}: {error}")
    finally:
        give_up.cancel()


def _give_up(launch: Launch, why: str) -> NoReturn:
    """Ends this process, whatever its main thread is blocked on."""
    text = (
        f"error: the {launch.num_processes} processes did not all meet at "
        f"{launch.coordinator}: one did not start, died, or cannot be reached ({why})."
    )
    print(text, file=sys.stderr, flush=True)
    os._exit(RESUMABLE)

# SPDX-License-Identifier: Apache-2.0
"""Joins this process to the others of its run, starts its watchdog, and leaves."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax

from jaxllm.cluster.aborts import delay_aborts
from jaxllm.cluster.devices import check_devices, find_devices, local_devices
from jaxllm.cluster.door import Door
from jaxllm.cluster.knock import knock
from jaxllm.cluster.launch import (
    Launch,
    check_host_name,
    find_launch,
    write_address,
)
from jaxllm.cluster.limits import Limits
from jaxllm.cluster.peers import Peers
from jaxllm.cluster.phases import Phases
from jaxllm.cluster.watchdog import Watchdog
from jaxllm.config import DistributedConfig
from jaxllm.errors import RESUMABLE, InputError

_LATER = 3  # factor on our timeouts, for JAX, which aborts: ours must come first
# An address of this host for each that means all of its addresses.
_LOCAL = {"::": "127.0.0.1", "0.0.0.0": "127.0.0.1"}

_watchdog: Watchdog | None = None  # of this process
_door: Door | None = None  # of the run, if this process leads it


def join(config: DistributedConfig, phases: Phases | None = None) -> None:
    """Joins the other processes of the run, if any; call it before using a device.

    It starts a watchdog, which ends this process with 75 if another one dies, or if a
    phase of any process exceeds its limit.

    Raises:
      InputError: see `jaxllm.cluster.launch`, `devices` and `door`.
    """
    launch = find_launch(os.environ)
    if jax.distributed.is_initialized():
        return
    limits = None if phases is None else Limits(phases, config.stall_timeout_s)
    if launch is None:
        _watch(limits, config, None)
    else:
        with _time_limit(launch, config.start_timeout_s):
            _meet(launch, config, limits)
    try:
        devices = find_devices(jax.config.jax_platforms)
    except InputError:
        hear_others()  # it may be another process that is missing, and not a device
        raise
    check_devices(launch, os.environ, devices)


def write_stacks_to(workdir: Path) -> None:
    """Sets the directory for the stacks of all threads, written if the run hangs."""
    if _watchdog is not None:
        _watchdog.workdir = workdir


def hear_others() -> None:
    """Waits a moment before an error is printed: another process may be its cause.

    If so, this does not return: the watchdog reports the cause and ends this process.
    """
    if _watchdog is not None and not _watchdog.is_alone:
        _watchdog.hear()


def leave(status: int, why: str = "") -> NoReturn:
    """Exits; with a reason for an error, so that the other processes end too.

    Python's ordinary exit would wait for all of them at JAX's last barrier, and be
    aborted there after a while if one of them cannot reach it.
    """
    is_watched = _watchdog is not None and not _watchdog.is_alone
    if not is_watched and not jax.distributed.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    if _watchdog is None or not is_watched:  # the processes are not connected
        os._exit(status)
    if _door is not None:
        _door.close()  # the next start of the run may listen
    _watchdog.leave(status, why)


def _watch(limits: Limits | None, config: DistributedConfig, peers: Peers | None):
    global _watchdog
    _watchdog = Watchdog(limits, config.heartbeat_timeout_s, peers=peers)
    _watchdog.start()


def _meet(launch: Launch, config: DistributedConfig, limits: Limits | None) -> None:
    """Connects this process with the others, first our watchdogs and then JAX."""
    global _door
    delay_aborts()
    if jax.config.jax_platforms == "cpu":
        check_host_name(os.environ, socket.gethostname())
    devices, limit_s = local_devices(os.environ), config.start_timeout_s
    # Its handler would take SIGTERM away from `cluster.preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    with contextlib.ExitStack() as stack:
        if launch.process_id == 0:
            _door = Door(launch)
            peers = _door.gather(limit_s)
            host, port = stack.enter_context(_door.reserve()).getsockname()[:2]
            peers.send({"service": port})
            _door.guard()
            bind = write_address(host, port)
            service = write_address(_LOCAL.get(host) or host, port)
        else:
            (peers, service), bind = knock(launch, limit_s), None
        _watch(limits, config, peers)
        jax.distributed.initialize(
            service,
            launch.num_processes,
            launch.process_id,
            local_device_ids=devices,
            initialization_timeout=_LATER * limit_s,
            heartbeat_timeout_seconds=_LATER * config.heartbeat_timeout_s,
            coordinator_bind_address=bind,
        )


@contextlib.contextmanager
def _time_limit(launch: Launch, limit_s: float) -> Iterator[None]:
    """Ends this process if the block fails or takes too long."""
    why = f"config.distributed.start_timeout_s={limit_s} have passed"
    # A moment later than the door, which knows who is missing.
    give_up = threading.Timer(limit_s + 1, _give_up, (launch, why))
    give_up.daemon = True
    give_up.start()
    try:
        yield
    except (jax.errors.JaxRuntimeError, OSError) as error:
        hear_others()
        _give_up(launch, f"{type(error).__name__}: {error}")
    finally:
        give_up.cancel()


def _give_up(launch: Launch, why: str) -> NoReturn:
    """Ends this process, whatever its main thread is blocked on."""
    text = (
        f"error: the {launch.num_processes} processes did not all meet at "
        f"{launch.address}: one did not start, died, or cannot be reached ({why})."
    )
    print(text, file=sys.stderr, flush=True)
    os._exit(RESUMABLE)

# SPDX-License-Identifier: Apache-2.0
"""The launch of this process: by SLURM, by hand, or alone."""

import dataclasses
import hashlib
import ipaddress
import socket
import subprocess
from collections.abc import Mapping

from jaxllm.errors import InputError

# Set these to start processes by hand; under SLURM its own variables are read.
COORDINATOR = "JAXLLM_COORDINATOR"  # host:port at which the processes meet
NUM_PROCESSES = "JAXLLM_NUM_PROCESSES"
PROCESS_ID = "JAXLLM_PROCESS_ID"
_BY_HAND = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
JOB = "JAXLLM_JOB"  # a text, best a secret one, that only this run's processes have

# Above those that Linux gives to outgoing connections.
_FIRST_PORT, _NUM_PORTS = 61440, 4096
_CHOICE = 4  # ports that a job of SLURM may take, if others have some of them


@dataclasses.dataclass(frozen=True)
class Launch:
    """The address and the numbers with which this process joins the others.

    Attributes:
      host: of process 0.
      ports: process 0 takes the first that is free.
      job: what all processes of the run know, and no other run has.
      is_by_hand: whether the address was given, and not found.
    """

    host: str
    ports: tuple[int, ...]
    num_processes: int
    process_id: int
    job: str = ""
    is_by_hand: bool = True

    @property
    def address(self) -> str:
        """The address, as a user writes it."""
        return write_address(self.host, " or ".join(map(str, self.ports)))


def write_address(host: str, port: int | str) -> str:
    """Returns an address as JAX reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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
        return _by_slurm(environment, num_tasks) if num_tasks > 1 else None
    if num_tasks > 1:
        raise InputError(
            f"SLURM_NTASKS={num_tasks}, but this process was started without srun and "
            "would be alone; start it as `srun python -m jaxllm.train ...`."
        )
    return None


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
    if number == 1:
        return None
    host, port = _host_and_port(environment[COORDINATOR])
    return Launch(host, (port,), number, index, environment.get(JOB, ""))


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 2**16
    if not host or not is_port or (":" in host and not is_bracketed):
        raise InputError(
            f"{COORDINATOR}={text} must be the host of process 0 and a port from 1 to "
            "65535 that is free there, such as node1:12345 or [fd00::1]:12345."
        )
    return host.strip("[]"), int(port)


def _by_slurm(environment: Mapping[str, str], number: int) -> Launch:
    # Two steps of a job must not meet, nor two starts of one that was requeued.
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job = " ".join(environment.get(name, "0") for name in names)
    return Launch(
        _first_host(environment["SLURM_STEP_NODELIST"]),
        _ports(job),
        number,
        int(environment["SLURM_PROCID"]),
        f"{environment.get(JOB, '')} {job}",
        is_by_hand=False,
    )


def _ports(job: str) -> tuple[int, ...]:
    """Returns the ports of a job, by a hash: other jobs have other ones, by chance."""
    found = hashlib.sha256(job.encode()).digest()
    numbers = [int.from_bytes(found[2 * i : 2 * i + 2]) for i in range(_CHOICE)]
    return tuple(_FIRST_PORT + number % _NUM_PORTS for number in numbers)


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

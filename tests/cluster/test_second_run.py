# SPDX-License-Identifier: Apache-2.0
"""A second run that is given the address of one that trains, and noise at its ports."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SETTINGS = {"steps": 100_000, "eval.every": 0, "checkpoint.every": 1000, "mesh.fsdp": 2}


def reach(processes, step: int):
    while f"step {step}/" not in processes.said(0):
        time.sleep(0.02)
        ended = [process.poll() for process in processes.processes]
        assert ended == [None, None], processes.said(0) + processes.said(1)


def last_step(processes) -> int:
    lines = processes.said(0).splitlines()
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    return int(steps[-1].partition("/")[0])


def listening_ports(pid: int) -> set[int]:
    """Returns the TCP ports at which a process listens."""
    sockets = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        sockets.add(os.readlink(path))
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(int(fields[1].rpartition(":")[2], 16))
    return found


def test_a_second_run_at_the_address_of_the_first_is_refused(
    tiny, tmp_path, start_processes
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {"JAXLLM_COORDINATOR": address}
    first = start_processes(tiny(SETTINGS), tmp_path, 2, 1, "first", env=env)
    reach(first, 20)
    second = start_processes(tiny(SETTINGS), tmp_path, 2, 1, "second", env=env)
    assert second.wait() == [2, 2], second.said(0) + second.said(1)
    for index in range(2):
        (said,) = second.said(index).splitlines()
        assert said.startswith(f"error: JAXLLM_COORDINATOR={address}: ")
        assert "port of its own" in said
    assert not (tmp_path / "second").exists()
    # The advice is right: with a port of its own it trains.
    third = start_processes(tiny(SETTINGS | {"steps": 2}), tmp_path, 2, 1, "third")
    assert third.wait() == [0, 0], third.said(0) + third.said(1)
    reach(first, last_step(first) + 10)
    first.processes[1].send_signal(signal.SIGTERM)
    assert first.wait() == [75, 75]


def test_noise_at_every_port_of_a_run_does_not_end_it(tiny, tmp_path, start_processes):
    pair = start_processes(tiny(SETTINGS), tmp_path, 2, 1, "run")
    reach(pair, 20)
    ports = listening_ports(pair.processes[0].pid)
    assert len(ports) >= 2  # the door, and JAX's service
    held = []
    for port in sorted(ports):
        for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(10_000)):
            held.append(socket.create_connection(("127.0.0.1", port), timeout=5))
            held[-1].sendall(noise)
    reach(pair, last_step(pair) + 100)
    for each in held:
        each.close()
    reach(pair, last_step(pair) + 100)
    pair.processes[0].send_signal(signal.SIGTERM)
    assert pair.wait() == [75, 75]

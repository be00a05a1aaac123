# SPDX-License-Identifier: Apache-2.0
"""A process dies, stops, fails or gets no data: all end, and say which one it was."""

import signal
import time

import pytest

SETTINGS = {
    **{"steps": 100_000, "eval.every": 0, "checkpoint.every": 1000, "mesh.fsdp": 2},
    "distributed.heartbeat_timeout_s": 8,
    "distributed.stall_timeout_s": 8,
}
STOPPED_S = 8 + 8 / 4 + 8  # what docs/reliability.md says, for these settings
RESUMES = "The same command resumes from the newest save."
IN_PROCESS_ONE = """
import os, time
from jaxllm.data.packing import ConcatRows

read = ConcatRows.read

def read_badly(self, rows, reads=[]):
    reads.append(rows)
    if len(reads) > 20 and os.environ["JAXLLM_PROCESS_ID"] == "1":
        {}
    return read(self, rows)

ConcatRows.read = read_badly
"""


@pytest.fixture
def pair(tiny, tmp_path, start_processes):
    """Starts two processes; the first lines of a config can be given."""
    return lambda preamble="": start_processes(
        tiny(SETTINGS), tmp_path, 2, 1, "run", preamble=preamble
    )


def until_it_trains(processes):
    while "step 20/" not in processes.said(0):
        time.sleep(0.02)
        ended = [process.poll() for process in processes.processes]
        assert ended == [None, None], processes.said(0) + processes.said(1)


def name(processes, index: int) -> str:
    return f", pid {processes.processes[index].pid})"


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_whoever_is_killed_takes_the_other_along_at_once(pair, killed):
    processes = pair()
    until_it_trains(processes)
    processes.processes[killed].kill()
    other = 1 - killed
    assert processes.processes[other].wait(30) == 75
    *_, error, last = processes.said(other).splitlines()
    assert error.startswith(f"error: process {killed} (")
    assert error.endswith(f"{name(processes, killed)} died: its connection has ended.")
    assert last == RESUMES


@pytest.mark.slow
def test_one_that_is_stopped_is_named_within_the_stated_time(pair, tmp_path):
    processes = pair()
    until_it_trains(processes)
    began_s = time.monotonic()
    processes.processes[1].send_signal(signal.SIGSTOP)
    assert processes.processes[0].wait(60) == 75
    assert time.monotonic() - began_s < STOPPED_S
    said = processes.said(0)
    assert f"{name(processes, 1)} has given no sign of life for " in said
    (path,) = (tmp_path / "run" / "stalls").glob("*-process-0.txt")
    assert "jaxllm/records/interval.py" in path.read_text()
    processes.processes[1].send_signal(signal.SIGCONT)
    assert processes.processes[1].wait(30) == 75


@pytest.mark.slow
def test_one_that_gets_no_data_is_named_by_both(pair, tmp_path):
    processes = pair(IN_PROCESS_ONE.format("time.sleep(1000)"))
    assert processes.wait() == [75, 75]
    for index in range(2):
        assert f"{name(processes, 1)} is waiting for the data of" in (
            processes.said(index)
        )
    stacks = sorted((tmp_path / "run" / "stalls").iterdir())
    assert [path.name[-5] for path in stacks] == ["0", "1"]
    assert "in read_badly" in stacks[1].read_text()


def test_one_that_fails_takes_the_other_along_with_its_status(pair):
    processes = pair(IN_PROCESS_ONE.format("raise RuntimeError('cosmic ray')"))
    assert processes.wait() == [1, 1]
    assert "Traceback" in processes.said(1)
    assert f"{name(processes, 1)} ended with status 1: " in processes.said(0)
    assert "cosmic ray" in processes.said(0)
    assert "Traceback" not in processes.said(0)

# SPDX-License-Identifier: Apache-2.0
"""How a process was started, and where it meets the others."""

import collections
import socket

import pytest

from jaxllm.cluster.launch import Launch, check_host_name, find_launch
from jaxllm.errors import InputError

HAND = {"JAXLLM_COORDINATOR": "a:1", "JAXLLM_NUM_PROCESSES": "4"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n1,n2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, None),
        (HAND | {"JAXLLM_PROCESS_ID": "3"}, Launch("a", (1,), 4, 3)),
        (HAND | {"JAXLLM_NUM_PROCESSES": "1", "JAXLLM_PROCESS_ID": "0"}, None),
        (
            HAND | {"JAXLLM_COORDINATOR": "[fd00::1]:9", "JAXLLM_PROCESS_ID": "3"},
            Launch("fd00::1", (9,), 4, 3),
        ),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}, None),
    ],
)
def test_the_environment_says_how_a_process_was_started(environment, launch):
    assert find_launch(environment) == launch


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_NTASKS": "4"}, "without srun"),
        (HAND, "JAXLLM_PROCESS_ID not; set all three"),
        (HAND | {"JAXLLM_PROCESS_ID": "4"}, "must be from 0 to"),
        (HAND | {"JAXLLM_PROCESS_ID": "-1"}, "must be from 0 to"),
        (HAND | {"JAXLLM_PROCESS_ID": "x"}, "invalid literal"),
        *(
            (
                HAND | {"JAXLLM_PROCESS_ID": "1", "JAXLLM_COORDINATOR": wrong},
                "must be the host of process 0 and a port from 1 to 65535",
            )
            for wrong in ("a", "a:", ":1", "a:0", "a:65536", "a:b", "fd00::1:9")
        ),
    ],
)
def test_half_an_environment_is_refused(environment, message):
    with pytest.raises(InputError, match=message):
        find_launch(environment)


def of_job(job: int, **other: int) -> Launch:
    launch = find_launch(
        STEP | {"SLURM_JOB_ID": str(job)} | {k: str(v) for k, v in other.items()}
    )
    assert launch is not None
    return launch


def test_all_processes_of_a_step_have_the_same_ports_and_the_same_job():
    first, other = of_job(7), of_job(7, SLURM_PROCID=0, SLURM_LOCALID=0)
    assert (first.host, first.num_processes, first.process_id) == ("n1", 4, 3)
    assert not first.is_by_hand
    assert (first.ports, first.job) == (other.ports, other.job)


def test_steps_and_starts_of_a_job_do_not_meet():
    launches = [of_job(7), of_job(7, SLURM_STEP_ID=3), of_job(7, SLURM_RESTART_COUNT=1)]
    assert len({launch.job for launch in launches}) == 3
    assert len({launch.ports for launch in launches}) == 3


@pytest.mark.parametrize("apart", [1, 16, 256, 4096])
def test_ports_of_neighbouring_and_equally_spaced_jobs_differ(apart):
    ports = [of_job(1000 + apart * n).ports for n in range(2000)]
    assert all(61440 <= port < 65536 for each in ports for port in each)
    # 2000 jobs over 4096 ports: by chance the fullest port has 6 or 7.
    first = collections.Counter(each[0] for each in ports)
    assert max(first.values()) < 10
    assert len(first) > 1500
    # Neither do two jobs share all ports that they may take.
    assert len(set(ports)) == 2000


def test_a_secret_of_the_job_is_part_of_what_its_processes_know():
    assert of_job(7, JAXLLM_JOB=5).job != of_job(7, JAXLLM_JOB=6).job
    hand = HAND | {"JAXLLM_PROCESS_ID": "3", "JAXLLM_JOB": "mine"}
    assert find_launch(hand) == Launch("a", (1,), 4, 3, "mine")


def test_a_name_that_leads_a_node_to_itself_is_refused(monkeypatch):
    several = {"SLURM_STEP_NUM_NODES": "2", "SLURMD_NODENAME": "node7"}
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(InputError, match=r"node7, is 127\.0\.1\.1 on it"):
        check_host_name(several, "node7")
    check_host_name(several | {"SLURM_STEP_NUM_NODES": "1"}, "node7")
    check_host_name(several, "host")  # several nodes on one machine
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.7")
    check_host_name(several, "node7")

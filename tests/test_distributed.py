# SPDX-License-Identifier: Apache-2.0
"""Several processes train what one trains, stop together and fail together."""

import dataclasses
import json
import os
import pprint
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from jaxllm.checkpoint import find_steps
from jaxllm.config import Config


@dataclasses.dataclass
class Processes:
    """Some processes of one run, on this machine."""

    processes: list[subprocess.Popen]
    logs: list[Path]

    def wait(self) -> list[int]:
        return [process.wait(timeout=300) for process in self.processes]

    def said(self, index: int) -> str:
        return self.logs[index].read_text()


def start(config: Config, folder: Path, number: int, devices: int, run: str):
    """Starts the training of config in folder/run, by some processes."""
    path = folder / "config.py"
    path.write_text(
        "from jaxllm.config import *\n"
        f"def get_config():\n    return {pprint.pformat(config)}\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, logs = [], []
    for index in range(number):
        environment = {
            **os.environ,
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAXLLM_COORDINATOR": f"127.0.0.1:{port}",
            "JAXLLM_NUM_PROCESSES": str(number),
            "JAXLLM_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-m", "jaxllm.train", f"--config={path}"]
        logs.append(folder / f"{run}-{number}-{index}.log")
        with logs[-1].open("w") as log:
            processes.append(
                subprocess.Popen(
                    [*command, f"--workdir={folder / run}"],
                    env=environment,
                    stdout=log,
                    stderr=log,
                )
            )
    return Processes(processes, logs)


def records(folder: Path) -> dict[tuple[int, bool], dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {(line["step"], "eval_loss" in line): line for line in lines}


def test_two_processes_stop_together_and_one_goes_on_as_if_alone(tiny, tmp_path):
    settings = {"mesh.fsdp": 2, "mesh.tensor": 2, "steps": 60, "checkpoint.every": 50}
    config = tiny(settings | {"eval.every": 0})
    alone = start(config, tmp_path, 1, 4, "alone")
    assert alone.wait() == [0], alone.said(0)
    pair = start(config, tmp_path, 2, 2, "pair")
    metrics = tmp_path / "pair" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.01)
    pair.processes[1].send_signal(signal.SIGTERM)  # the one that does not lead
    assert pair.wait() == [75, 75], pair.said(0) + pair.said(1)
    assert find_steps(tmp_path / "pair" / "checkpoints")[0] != []
    rest = start(config, tmp_path, 1, 4, "pair")
    assert rest.wait() == [0], rest.said(0)
    one, many = records(tmp_path / "alone"), records(tmp_path / "pair")
    assert one.keys() == many.keys()
    assert [s for s in one if one[s]["loss"] != many[s]["loss"]] == []
    assert [s for s in one if one[s]["grad_norm"] != many[s]["grad_norm"]] == []


def test_what_the_leading_process_refuses_ends_all_of_them(tiny, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    pair = start(tiny({"eval.every": 0}), tmp_path, 2, 1, "taken")
    assert pair.wait() == [2, 2]
    for index in range(2):
        assert "has files but no run" in pair.said(index)
        assert "Traceback" not in pair.said(index)

# SPDX-License-Identifier: Apache-2.0
"""Trains the first steps of a config in 1, 2 and 4 processes, and compares them.

python scripts/compare_processes.py --config configs/x.py [--meshes "data=2,tensor=2"]
    [--processes 1,2,4] [--devices 4] [--steps 5]

Each number of processes has the same simulated CPU devices in all, and trains on each
mesh: if --meshes is not given, on each axis alone and each two of them. Exit status: 0
losses, gradient norms and initial parameters agree, 1 they do not, 2 wrong input.
"""

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import flags as absl_flags

import sharding
from jaxllm import flags
from jaxllm.cluster import agreement, membership
from jaxllm.cluster.launch import COORDINATOR, NUM_PROCESSES, PROCESS_ID
from jaxllm.compare_meshes import (
    follow,
    parse_meshes,
    prepare_on,
    standard_meshes,
    tolerance_of,
)
from jaxllm.errors import InputError

ROW = "{:<28} {:>9}  {:<10} {:>8} {:>9}".format
Courses = list[dict]  # of each mesh: parameters, losses, grad_norms; or refusal


def start(number: int, devices: int, file: Path) -> list[subprocess.Popen]:
    """Starts the processes that write the courses of one number of processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices // number),
        COORDINATOR: coordinator,
        NUM_PROCESSES: str(number),
    }
    command = [sys.executable, *sys.argv, f"--result={file}", f"--devices={devices}"]
    return [
        subprocess.Popen(
            command,
            env=environment | {PROCESS_ID: str(index)},
            stdout=subprocess.DEVNULL,  # of gloo
        )
        for index in range(number)
    ]


def courses_of(number: int, devices: int) -> Courses:
    """Returns what some processes train on each mesh."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "courses.json"
        processes = start(number, devices, file)
        try:
            statuses = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(statuses):
            sys.exit(f"of {number} processes some failed: exit {statuses}")
        return json.loads(file.read_text())


def write_courses(file: Path) -> int:
    """Trains on each mesh as one of the processes."""
    values = absl_flags.FLAGS
    config = flags.config_from_flags()
    membership.join(config.distributed)
    courses = []
    for sizes in _meshes():
        try:
            course = follow(prepare_on(config, sizes), values.steps)
        except (InputError, sharding.ShardingError) as error:
            courses.append({"refusal": str(error)})
            continue
        courses.append(
            {
                "parameters": course.parameters,
                "losses": course.losses.tolist(),
                "grad_norms": course.grad_norms.tolist(),
            }
        )
    if agreement.is_lead():
        file.write_text(json.dumps(courses))
    return flags.FINISHED


def main(argv: list[str]) -> int:
    """Prints a row for each mesh and number of processes."""
    del argv
    values = absl_flags.FLAGS
    if values.result:
        return write_courses(Path(values.result))
    numbers = [int(number) for number in values.processes]
    if bad := [number for number in numbers if values.devices % number]:
        raise InputError(
            f"--processes={bad[0]} does not divide --devices={values.devices}; give "
            "numbers that do."
        )
    tolerance = tolerance_of(flags.config_from_flags().model)
    status = flags.FINISHED
    every = [courses_of(number, values.devices) for number in numbers]
    print(f"{values.steps} steps; relative differences from {numbers[0]} process(es)")
    print(ROW("mesh", "processes", "parameters", "loss", "grad_norm"))
    for index, sizes in enumerate(_meshes()):
        name = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        first = every[0][index]
        if "refusal" in first:
            print(f"{name:<28} refused: {first['refusal'].splitlines()[0]}")
            continue
        for number, courses in zip(numbers[1:], every[1:], strict=True):
            same = courses[index]["parameters"] == first["parameters"]
            far = [
                _far(courses[index][what], first[what])
                for what in ("losses", "grad_norms")
            ]
            print(
                ROW(name, number, "identical" if same else "differ", *map(_shown, far))
            )
            if not same or far[0] > tolerance:
                status = flags.FAILED
    return status


def _far(one: list[float], other: list[float]) -> float:
    return float(np.abs(np.array(one) / np.array(other) - 1).max())


def _shown(difference: float) -> str:
    return f"{difference:.1e}" if difference else "bitwise"


def _meshes() -> list[dict[str, int]]:
    values = absl_flags.FLAGS
    if not values.meshes:
        return standard_meshes(values.devices)
    meshes = parse_meshes(values.meshes)
    for sizes in meshes:
        if math.prod(sizes.values()) != values.devices:
            raise InputError(
                f"--meshes={values.meshes!r}: {sizes} must be --devices="
                f"{values.devices} devices, for every process to have some of them."
            )
    return meshes


if __name__ == "__main__":
    flags.define_config_flags()
    absl_flags.DEFINE_string("meshes", None, "such as 'data=4 fsdp=2,tensor=2'")
    absl_flags.DEFINE_list("processes", ["1", "2", "4"], "numbers of processes")
    absl_flags.DEFINE_integer("devices", 4, "of all processes together", lower_bound=1)
    absl_flags.DEFINE_integer("steps", 5, "updates on each mesh", lower_bound=1)
    absl_flags.DEFINE_string("result", None, "where a process writes; not for users")
    flags.run(main)

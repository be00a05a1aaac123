# SPDX-License-Identifier: Apache-2.0
"""Kills a run at bad moments, resumes it, and compares it with an undisturbed one.

python scripts/kill_and_resume.py --config configs/quickstart.py [--config.steps=60]
    [--workdir runs/killed] [--kills 12] [--seed 0]

SIGINT, SIGTERM and SIGKILL in turn; while it starts, compiles, steps, saves, evaluates.
The same command goes on each time. It must exit with 75 when asked to stop, and end
with bitwise the parameters and optimizer state, and the losses, of the undisturbed run.
"""

import contextlib
import dataclasses
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags

import sharding
from jaxllm import flags
from jaxllm.checkpoint import Checkpoints, find_steps
from jaxllm.config import Config, InputError
from jaxllm.metrics import FILE, OF_THE_CLOCK
from jaxllm.step import prepare
from jaxllm.workdir import CHECKPOINTS

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
MOMENTS = ("start", "compile", "step", "save", "eval")
ROW = "{:>4}  {:<8} {:<8} {:>7} {:>7} {:>6}  {}".format
POLL_S = 0.001


@dataclasses.dataclass
class Run:
    """A command that trains, and what can be seen of it from outside."""

    command: list[str]
    workdir: Path
    log: Path

    def start(self) -> subprocess.Popen:
        """Starts the command with an empty log."""
        with self.log.open("wb") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log)

    def records(self) -> list[dict[str, Any]]:
        """Returns the whole lines of metrics.jsonl."""
        path = self.workdir / FILE
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def last_step(self) -> int:
        """Returns the last step with a loss, or -1."""
        return max((r["step"] for r in self.records() if "loss" in r), default=-1)

    def saved_steps(self) -> list[int]:
        """Returns the whole saves."""
        return find_steps(self.workdir / CHECKPOINTS)[0]

    def saves_under_way(self) -> set[tuple[str, int]]:
        """Returns name and inode of the saves that are not whole, or were cut off."""
        found = set()
        for path in self.workdir.glob(f"{CHECKPOINTS}/*.orbax-checkpoint-tmp"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ino))
        return found

    def is_training(self) -> bool:
        """Returns whether it has come far enough to catch signals."""
        return self.log.stat().st_size > 0


def reach(
    moment: str, run: Run, config: Config, rng: random.Random, kills: int
) -> Callable[[], bool]:
    """Returns a function that says whether a run has come to a moment."""
    before, cut_off = run.last_step(), run.saves_under_way()
    if moment == "start":
        end_s = time.monotonic() + rng.uniform(0, 3)
        return lambda: time.monotonic() > end_s
    if moment == "compile":
        return lambda: "attention:" in run.log.read_text()
    if moment == "save":
        return lambda: bool(run.saves_under_way() - cut_off)
    every = config.eval.every
    if moment == "eval" and every:
        # The last thing written before an evaluation is the loss of the step before.
        first = max(before, (run.saved_steps() or [0])[-1])
        due = (first // every + 1) * every - 1
        return lambda: run.last_step() >= due
    target = before + rng.randint(1, max(1, config.steps // (kills + 1)))
    return lambda: run.last_step() >= target


def kill(number: int, moment: str, run: Run, reached: Callable[[], bool]) -> str | None:
    """Runs until the moment, then kills; returns what is wrong with how it ended."""
    resumed = (run.saved_steps() or ["-"])[-1]
    process, began_at_s = run.start(), time.monotonic()
    while process.poll() is None and not reached():
        time.sleep(POLL_S)
    name = SIGNALS[number % len(SIGNALS)]
    caught, is_done = run.is_training(), process.poll() is not None
    process.send_signal(name)
    status, took_s = process.wait(), time.monotonic() - began_at_s
    row = (number + 1, name.name, moment, resumed, run.last_step(), status)
    print(ROW(*row, f"{took_s:.1f}"), flush=True)
    if is_done:
        return f"the run was over ({status}) before kill {number + 1}: give more steps"
    right = {-name} if name == signal.SIGKILL else {flags.RESUMABLE}
    if not caught:
        right.add(-name)
    return None if status in right else f"kill {number + 1} ends with {status}"


def differences(config: Config, runs: tuple[Run, Run]) -> tuple[list[str], str]:
    """Returns what differs between the ends of two runs, and what was compared."""
    setup = prepare(config, sharding.make_mesh(config.mesh.sizes))
    states = []
    for run in runs:
        with Checkpoints(run.workdir / CHECKPOINTS, config.checkpoint) as saved:
            state, _ = saved.restore(config.steps, setup.abstract_state)
        states.append(jax.tree.leaves_with_path(jax.device_get(state)))
    found = [
        f"{jax.tree_util.keystr(path)} differs"
        for (path, one), (_, other) in zip(*states, strict=True)
        if np.asarray(one).tobytes() != np.asarray(other).tobytes()
    ]
    lines = [
        [{k: v for k, v in r.items() if k not in OF_THE_CLOCK} for r in run.records()]
        for run in runs
    ]
    if lines[0] != lines[1]:
        found.append(f"{FILE} differs in its losses or steps")
    num_bytes = sum(np.asarray(leaf).nbytes for _, leaf in states[0])
    what = f"{len(states[0])} arrays ({num_bytes:,} bytes) and {len(lines[0])} lines"
    return found, what


def main(argv: list[str]) -> int:
    """Runs the whole comparison; 0 if nothing differs."""
    del argv
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    values = absl_flags.FLAGS
    config = flags.config_from_flags()
    given = [name for name in values if name.split(".")[0] == "config"]
    command = [sys.executable, "-m", "jaxllm.train"]
    command += [f"--{n}={values[n].value}" for n in given if values[n].value]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(values.workdir or temporary)
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"--workdir={folder} is not empty; give a new directory.")
        folder.mkdir(parents=True, exist_ok=True)
        runs = tuple(
            Run([*command, f"--workdir={place}"], place, place.with_suffix(".log"))
            for place in (folder / "undisturbed", folder / "killed")
        )
        return compare(config, runs, values.kills, random.Random(values.seed))


def compare(config: Config, runs, kills: int, rng: random.Random) -> int:
    """Runs one undisturbed and kills the other; prints a table and the verdict."""
    undisturbed, killed = runs
    if status := undisturbed.start().wait():
        print(undisturbed.log.read_text(), file=sys.stderr)
        return status
    print(ROW("kill", "signal", "moment", "resumes", "reaches", "exit", "seconds"))
    found = []
    for number in range(kills):
        moment = MOMENTS[number % len(MOMENTS)]
        reached = reach(moment, killed, config, rng, kills)
        if wrong := kill(number, moment, killed, reached):
            found.append(wrong)
            break
    status = killed.start().wait()
    print(ROW("", "none", "", "", killed.last_step(), status, ""))
    if status:
        print(killed.log.read_text(), file=sys.stderr)
        return status
    different, what = differences(config, runs)
    found += different
    print(f"compared {what}: {'; '.join(found) or 'bitwise equal'}.")
    return flags.FAILED if found else flags.FINISHED


if __name__ == "__main__":
    flags.define_config_flags()
    absl_flags.DEFINE_integer("kills", 12, "times to kill the run", lower_bound=1)
    absl_flags.DEFINE_integer("seed", 0, "of the moments")
    flags.run(main)

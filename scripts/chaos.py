# SPDX-License-Identifier: Apache-2.0
"""Disturbs a run of several processes again and again, and compares it with a calm one.

python scripts/chaos.py --config configs/quickstart.py [--config.steps=400]
    [--processes 3] [--events 12] [--seed 0] [--workdir runs/chaos]

An event kills (-9), stops (SIGSTOP) or asks to stop (SIGTERM, SIGHUP) a random process
at a random moment: while it starts, compiles, steps, saves, evaluates. Whatever is left
must end by itself with 75, within --limit_s; then the same command goes on, as a
launcher would have it. No life may begin before the newest whole save. All the time
strangers knock at the port where the processes meet. At the end parameters, optimizer
state and losses must be bitwise those of the calm run. One process alone is not
stopped, for nobody would notice, but gets Ctrl-C (SIGINT).
"""

import collections
import contextlib
import dataclasses
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
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
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.cluster.knock import knock
from jaxllm.cluster.launch import COORDINATOR, JOB, NUM_PROCESSES, PROCESS_ID, Launch
from jaxllm.config import Config, MeshConfig
from jaxllm.errors import InputError
from jaxllm.records.metrics import FILE, OF_THE_CLOCK
from jaxllm.step import prepare

ASKING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
KINDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGHUP)
KINDS_ALONE = (signal.SIGKILL, *ASKING)
MOMENTS = ("start", "compile", "step", "save", "eval")
ROW = "{:>5}  {:<8} {:>7} {:<8} {:>7} {:>7}  {:<12} {:>7}".format
POLL_S = 0.005
STRANGERS = (  # and noise, and a process of another run
    *(b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"{}\n"),
    b"[" * 4000 + b"\n",
)
STRANGERS_HELD = 100  # connections that they keep open


class Strangers(threading.Thread):
    """Those who knock at the port of a run and do not belong to it.

    Attributes:
      port: where they knock.
      num_came: how many have been there.
      num_let_in: how many of them were taken for a process of the run.
    """

    def __init__(self, seed: int):
        super().__init__(daemon=True)
        self.port, self.num_came, self.num_let_in = 0, 0, 0
        self._rng = random.Random(seed)
        self._held: collections.deque[socket.socket] = collections.deque()

    def run(self) -> None:
        while True:
            time.sleep(self._rng.uniform(0, 0.05))
            with contextlib.suppress(OSError):
                self._come()

    def _come(self) -> None:
        port = self.port
        stranger = socket.create_connection(("127.0.0.1", port), timeout=1)
        self._held.append(stranger)
        if len(self._held) > STRANGERS_HELD:
            self._held.popleft().close()
        self.num_came += 1
        kind = self._rng.randrange(len(STRANGERS) + 2)
        if kind < len(STRANGERS):
            stranger.sendall(STRANGERS[kind])
        elif kind == len(STRANGERS):
            stranger.sendall(self._rng.randbytes(self._rng.randrange(10_000)))
        else:
            self._knock(port)

    def _knock(self, port: int) -> None:
        other = Launch("127.0.0.1", (port,), 3, 1, "another run", is_by_hand=False)
        with contextlib.suppress(TimeoutError):
            knock(other, 0.5)[0].close()
            self.num_let_in += 1


@dataclasses.dataclass
class Run:
    """A command that trains in some processes, and what can be seen from outside."""

    command: list[str]
    workdir: Path
    number: int
    strangers: Strangers

    @property
    def log(self) -> Path:
        """What the leading process says in this life."""
        return self.workdir.with_suffix(".0.log")

    def start(self) -> list[subprocess.Popen]:
        """Starts the processes of one life, as a launcher would."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.strangers.port, job = port, secrets.token_hex(8)
        started = []
        for index in range(self.number):
            environment = os.environ | {
                COORDINATOR: f"127.0.0.1:{port}",
                NUM_PROCESSES: str(self.number),
                PROCESS_ID: str(index),
                JOB: job,
            }
            with self.workdir.with_suffix(f".{index}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        self.command, env=environment, stdout=log, stderr=log
                    )
                )
        return started

    def records(self) -> list[dict[str, Any]]:
        """Returns the whole lines of metrics.jsonl."""
        path = self.workdir / FILE
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def last_step(self) -> int:
        """Returns the last step with a loss, or -1."""
        return max((r["step"] for r in self.records() if "loss" in r), default=-1)

    def newest_save(self) -> int:
        """Returns the step of the newest whole save, or 0."""
        return max(find_steps(self.workdir / CHECKPOINTS)[0], default=0)

    def saves_under_way(self) -> set[tuple[str, int]]:
        """Returns name and inode of the saves that are not whole, or were cut off."""
        found = set()
        for path in self.workdir.glob(f"{CHECKPOINTS}/*.orbax-checkpoint-tmp"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ino))
        return found

    def has_compiled(self) -> bool:
        """Returns whether this life trains; what was logged after its save is gone."""
        return "compiled the step" in self.log.read_text()

    def resumed_from(self) -> int | None:
        """Returns the step that this life began from, if it has come so far."""
        for line in self.log.read_text().splitlines():
            if line.startswith("resuming from step "):
                return int(line.split()[3])
        return None


def reach(
    moment: str, run: Run, config: Config, rng: random.Random, events: int
) -> Callable[[], bool]:
    """Returns a function that says whether a run has come to a moment."""
    before, cut_off = run.last_step(), run.saves_under_way()
    if moment == "start":
        end_s = time.monotonic() + rng.uniform(0, 4)
        return lambda: time.monotonic() > end_s
    if moment == "compile":
        return lambda: "attention:" in run.log.read_text()
    if moment == "save":
        return lambda: bool(run.saves_under_way() - cut_off)
    every = config.eval.every
    if moment == "eval" and every:
        # The last thing written before an evaluation is the loss of the step before.
        due = (max(before, run.newest_save()) // every + 1) * every - 1
        return lambda: run.has_compiled() and run.last_step() >= due
    target = before + rng.randint(1, max(1, config.steps // (events + 1)))
    return lambda: run.last_step() >= target


def end(processes: list[subprocess.Popen], limit_s: float) -> list[int | None]:
    """Waits for processes to end by themselves; None is one that did not."""
    end_s = time.monotonic() + limit_s
    while any(p.poll() is None for p in processes) and time.monotonic() < end_s:
        time.sleep(POLL_S)
    return [process.poll() for process in processes]


@dataclasses.dataclass
class Chaos:
    """What disturbs a run."""

    run: Run
    config: Config
    events: int
    limit_s: float
    rng: random.Random

    def disturb(self, number: int) -> list[str]:
        """Lives until the next event and its end; returns what is wrong with it."""
        run, rng = self.run, self.rng
        kind = rng.choice(KINDS if run.number > 1 else KINDS_ALONE)
        moment = rng.choice(MOMENTS)
        victim, newest = rng.randrange(run.number), run.newest_save()
        reached = reach(moment, run, self.config, rng, self.events)
        processes = run.start()
        while all(p.poll() is None for p in processes) and not reached():
            time.sleep(POLL_S)
        if done := [p.poll() for p in processes if p.poll() is not None]:
            for process in processes:
                process.kill()
                process.wait()
            if flags.FINISHED in done:
                return [f"event {number} came too late: give more steps"]
            said = re.findall("^error: .*", run.log.read_text(), re.M)
            return [f"event {number} came after {done}: {' '.join(said)}"]
        is_training = run.log.stat().st_size > 0  # far enough to catch signals
        began_at_s = time.monotonic()
        processes[victim].send_signal(kind)
        others = [p for i, p in enumerate(processes) if i != victim]
        is_asked = kind in ASKING
        waited = processes if is_asked else others
        statuses = end(waited, self.limit_s)
        took_s = time.monotonic() - began_at_s
        for process in processes:  # as a launcher does with what is left
            process.kill()
            process.wait()
        said = " ".join("hang" if s is None else str(s) for s in statuses)
        row = (number, kind.name, victim, moment, newest, run.last_step(), said)
        print(ROW(*row, f"{took_s:.1f}"), flush=True)
        right = {flags.RESUMABLE}
        if is_asked and not is_training:
            right.add(-kind)
        wrong = [f"event {number}: {s}" for s in statuses if s not in right]
        resumed = run.resumed_from()
        if resumed is not None and resumed < newest:
            wrong.append(f"event {number}: began from {resumed}, not {newest}")
        return wrong

    def finish(self) -> list[str]:
        """Lets the run come to its end."""
        statuses = [process.wait() for process in self.run.start()]
        print(ROW("", "none", "", "", "", self.run.last_step(), str(statuses), ""))
        return [] if set(statuses) == {flags.FINISHED} else [f"ends with {statuses}"]


def differences(config: Config, runs: tuple[Run, Run]) -> tuple[list[str], str]:
    """Returns what differs between the ends of two runs, and what was compared."""
    config = dataclasses.replace(config, mesh=MeshConfig())  # of this process alone
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


def compare(calm: Run, chaos: Chaos) -> int:
    """Runs one in peace and disturbs the other; prints a table and the verdict."""
    if set(statuses := [process.wait() for process in calm.start()]) != {0}:
        print(f"{statuses}: {calm.log.read_text()}", file=sys.stderr)
        return flags.FAILED
    print(ROW("event", "signal", "to", "moment", "resumes", "reaches", "exit", "s"))
    found = []
    for number in range(1, chaos.events + 1):
        found += chaos.disturb(number)
    found += chaos.finish()
    strangers = chaos.run.strangers
    if strangers.num_let_in:
        found.append(f"{strangers.num_let_in} strangers were let in")
    print(f"{strangers.num_came} strangers came.")
    different, what = differences(chaos.config, (calm, chaos.run))
    found += different
    print(f"compared {what}: {'; '.join(found) or 'bitwise equal'}.")
    return flags.FAILED if found else flags.FINISHED


def main(argv: list[str]) -> int:
    """Runs the whole comparison; 0 if nothing differs."""
    del argv
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as `nohup` does with this one
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
        strangers, number = Strangers(values.seed), values.processes
        calm, disturbed = (
            Run([*command, f"--workdir={folder / n}"], folder / n, number, strangers)
            for n in ("calm", "disturbed")
        )
        if number > 1:
            strangers.start()
        rng = random.Random(values.seed)
        chaos = Chaos(disturbed, config, values.events, values.limit_s, rng)
        return compare(calm, chaos)


if __name__ == "__main__":
    flags.define_config_flags()
    absl_flags.DEFINE_integer("events", 12, "times to disturb the run", lower_bound=1)
    absl_flags.DEFINE_integer("processes", 3, "of the run", lower_bound=1)
    absl_flags.DEFINE_float("limit_s", 60.0, "until all processes must have ended")
    absl_flags.DEFINE_integer("seed", 0, "of the events")
    flags.run(main)

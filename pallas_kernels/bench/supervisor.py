# SPDX-License-Identifier: Apache-2.0
"""Keeps worker processes going when a kernel crashes or never ends."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.bench.options import Options
from pallas_kernels.bench.record import Record, read_events

LIMITS_S = {
    "began": 150.0,  # to compile all of a case
    "holds": 45.0,  # to check and time it, since it said anything
}
GRACE_S = 30  # after `Options.until`, for the case that is running
POLL_S = 0.2
LOST = 3  # exit status of a worker that has said all and needs a new process
STAGES = ("began", "waits", "holds")
WORKER = (sys.executable, "-m", "pallas_kernels.bench.worker")


def supervise(
    options: Options,
    first: int,
    stride: int,
    command: Sequence[str] = WORKER,
    limits_s: Mapping[str, float] | None = None,
) -> None:
    """Runs a worker to its end, and again after each case that ended it early.

    Args:
      options: of the run.
      first: number of the worker's first case.
      stride: from one of its cases to the next.
      command: starts a worker.
      limits_s: by the stage of a case; waiting for the device has none. None is the
        usual ones on a GPU, and none in a dry run, which interprets kernels.
    """
    if limits_s is None:
        limits_s = {} if options.dry else LIMITS_S
    log = Path(options.folder) / f"worker-{first}.jsonl"
    arguments = [options.dumps(), str(first), str(stride)]
    for attempt in range(100):
        said = log.with_suffix(f".{attempt}.txt")
        with said.open("w") as output:
            worker = subprocess.Popen(
                [*command, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            reason = _watch(worker, log, options, limits_s)
        if reason is None:
            return
        if worker.returncode == LOST:
            continue
        running = _running(log)
        text = f"{reason}; its last words: {said.read_text()[-1500:]}"
        failed = {
            "operation": "bench",
            "name": f"(start of worker {first})",
            **(running or {}),  # with what our own kernel did, if it did
            "event": "done",
        }
        guilty = "others" if failed.get("timings") else "mosaic"
        failed["failures"] = {**failed.get("failures", {}), guilty: text}
        _append(log, failed)
        if running is None or time.time() > options.until:
            return


def read_records(folder: Path) -> list[Record]:
    """Returns what the workers have written of finished cases so far."""
    events = [e for log in sorted(folder.glob("*.jsonl")) for e in read_events(log)]
    return [event for event in events if event.pop("event") == "done"]


def _watch(
    worker: subprocess.Popen,
    log: Path,
    options: Options,
    limits_s: Mapping[str, float],
) -> str | None:
    """Returns why the worker ended before its last case, or None if it did not."""
    while worker.poll() is None:
        time.sleep(POLL_S)
        running, now = _running(log) or {}, time.time()
        limit_s = limits_s.get(running.get("event", ""), math.inf)
        if now > running.get("at", now) + limit_s or now > options.until + GRACE_S:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            stage = running.get("event", "starts")
            return f"killed as it {stage}: took {limit_s} s, or no time was left"
    return f"exit status {worker.returncode}" if worker.returncode else None


def _running(log: Path) -> dict[str, Any] | None:
    """Returns the last event of the case that began and is not done."""
    events = read_events(log)
    return events[-1] if events and events[-1]["event"] in STAGES else None


def _append(log: Path, event: dict[str, Any]) -> None:
    with log.open("a") as file:
        # A killed worker may have left half a line.
        print(f"\n{json.dumps(event)}", file=file)

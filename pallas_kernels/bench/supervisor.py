# SPDX-License-Identifier: Apache-2.0
"""Keeps worker processes going when a kernel crashes or never ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.bench.options import Options
from pallas_kernels.bench.record import Record, read_events

CASE_LIMIT_S = 150  # to compile, wait for the device, check and time a case
TILE_LIMIT_S = 240  # the same where its tiles are searched
GRACE_S = 30  # after `Options.until`, for the case that is running
POLL_S = 0.2
WORKER = (sys.executable, "-m", "pallas_kernels.bench.worker")


def supervise(
    options: Options,
    operation: str,
    first: int,
    stride: int,
    command: Sequence[str] = WORKER,
    limit_s: float | None = None,
) -> None:
    """Runs a worker to its end, and again after each case that ended it early.

    Args:
      options: of the run.
      operation: folder of the operation.
      first: number of the worker's first case.
      stride: from one of its cases to the next.
      command: starts a worker.
      limit_s: of a case; None is the usual one.
    """
    limit_s = limit_s or (TILE_LIMIT_S if options.tune else CASE_LIMIT_S)
    log = Path(options.folder) / f"{operation}-{first}.jsonl"
    arguments = [options.dumps(), operation, str(first), str(stride)]
    for attempt in range(100):
        said = log.with_suffix(f".{attempt}.txt")
        with said.open("w") as output:
            worker = subprocess.Popen(
                [*command, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            reason = _watch(worker, log, options, limit_s)
        if reason is None:
            return
        running = _running(log)
        text = f"{reason}; its last words: {said.read_text()[-1500:]}"
        failed = {
            "name": f"(start of worker {first})",
            **(running or {}),  # with what our own kernel did, if it did
            "event": "done",
            "operation": operation,
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
    worker: subprocess.Popen, log: Path, options: Options, limit_s: float
) -> str | None:
    """Returns why the worker ended before its last case, or None if it did not."""
    while worker.poll() is None:
        time.sleep(POLL_S)
        running = _running(log)
        now = time.time()
        took_too_long = running is not None and now > running["at"] + limit_s
        if took_too_long or now > options.until + GRACE_S:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            return f"killed: not done after {limit_s} s, or no time was left"
    return f"exit status {worker.returncode}" if worker.returncode else None


def _running(log: Path) -> dict[str, Any] | None:
    """Returns the event of the case that began and is not done."""
    events = read_events(log)
    return events[-1] if events and events[-1]["event"] == "began" else None


def _append(log: Path, event: dict[str, Any]) -> None:
    with log.open("a") as file:
        # A killed worker may have left half a line.
        print(f"\n{json.dumps(event)}", file=file)

# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run, written to metrics.jsonl, TensorBoard and Weights & Biases.

`metrics.jsonl` is the source of truth: one JSON object a line, in the order of steps,
each flushed as it is written. JSON has no NaN and no infinity: both are null there.
"""

import contextlib
import importlib
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from jaxllm.config import LoggingConfig
from jaxllm.errors import InputError
from jaxllm.files import parse_json, write_whole
from jaxllm.records.json_lines import open_jsonlines

FILE = "metrics.jsonl"
# What is not the same when a run is done again; all the rest is, bit for bit.
OF_THE_CLOCK = frozenset(
    ("tokens_per_s", "mfu", "step_s", "data_wait_s", "memory_bytes", "goodput")
)
_log = logging.getLogger(__name__)

Record = dict[str, Any]  # a step and what is known of it
Log = Callable[[int, Mapping[str, float]], None]  # step, scalars

# Protobuf makes their classes at import, where no type checker sees them.
_event: Any = event_pb2
_summary: Any = summary_pb2


class MetricsWriter:
    """Appends to metrics.jsonl, TensorBoard and Weights & Biases, on process 0 only.

    Lines of `resume_step` and later are from work that is lost and done again: they are
    removed, so that no step is there twice. Half a last line is removed too.
    """

    def __init__(
        self, workdir: Path, config: LoggingConfig, *, run_name: str, resume_step: int
    ):
        self._resources = contextlib.ExitStack()
        self._logs: list[Log] = []
        if jax.process_index() != 0:
            return
        workdir = Path(workdir)
        with contextlib.ExitStack() as opened:  # closed again if a later one fails
            if config.wandb_project is not None:
                run = _start_wandb(workdir, config.wandb_project, run_name)
                opened.callback(run.finish)
                self._logs.append(lambda step, s: run.log({"step": step, **s}))
            _drop_lost_lines(workdir / FILE, resume_step)
            self._logs.insert(0, _open_jsonl(workdir / FILE, opened))
            if config.tensorboard:
                folder = workdir / "tensorboard"
                self._logs.append(_open_tensorboard(folder, resume_step, opened))
            self._resources = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> dict[str, float]:
        """Writes the scalars of a step everywhere; returns them with `step`."""
        scalars = {k: float(v) for k, v in scalars.items() if k != "step"}
        for log in self._logs:
            log(step, scalars)
        return {"step": step, **scalars}

    def close(self) -> None:
        """Flushes and closes what was opened."""
        self._logs = []
        self._resources.close()


def device_memory_bytes() -> int | None:
    """Returns the peak of memory in use on a local device, or None on a CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks, default=None)


def check_loggers(config: LoggingConfig) -> None:
    """Raises InputError if a logger is asked for that is not installed."""
    if config.wandb_project is not None:
        _import_wandb(config.wandb_project)


def _open_jsonl(path: Path, opened: contextlib.ExitStack) -> Log:
    append = open_jsonlines(path, opened)

    def log(step: int, scalars: Mapping[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        append({"step": step, **finite})

    return log


def _drop_lost_lines(path: Path, resume_step: int) -> None:
    """Rewrites the file, at once or not at all, if any of its lines must go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    kept = path.with_name(f"{FILE}.{os.getpid()}.tmp")
    num_lines = num_dropped = 0
    try:
        with path.open("rb") as old, kept.open("wb") as new:
            for line in old:
                num_lines += 1
                if _is_lost(line, resume_step):
                    num_dropped += 1
                else:
                    new.write(line if line.endswith(b"\n") else line + b"\n")
            new.flush()
            os.fsync(new.fileno())
        if num_dropped or kept.stat().st_size != path.stat().st_size:
            kept.replace(path)
            _log.info(
                "%s: dropped %d of %d lines: steps from %d on are done again.",
                path,
                num_dropped,
                num_lines,
                resume_step,
            )
    finally:
        kept.unlink(missing_ok=True)


def _is_lost(line: bytes, resume_step: int) -> bool:
    try:
        record = parse_json(line)
    except ValueError:
        return not line.endswith(b"\n")  # half a line; other strangers are not ours
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return False
    return record["step"] >= resume_step


def _open_tensorboard(
    folder: Path, resume_step: int, opened: contextlib.ExitStack
) -> Log:
    # Only tensorboard's record format: its EventFileWriter imports TensorFlow where
    # that is installed, and writes from a thread whose errors nobody sees.
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
    path = folder / f"events.out.tfevents.{name}"
    writer = RecordWriter(opened.enter_context(path.open("wb", buffering=0)))

    def write(**event) -> None:
        record = _event.Event(wall_time=time.time(), **event)
        writer.write(record.SerializeToString())

    def log(step: int, scalars: Mapping[str, float]) -> None:
        values = [
            _summary.Summary.Value(tag=name, simple_value=value)
            for name, value in scalars.items()
        ]
        write(step=step, summary=_summary.Summary(value=values))

    write(file_version="brain.Event:2")
    # Makes the viewer forget the steps from here on that an earlier file has.
    start = _event.SessionLog(status=_event.SessionLog.START)
    write(step=resume_step, session_log=start)
    return log


def _start_wandb(workdir: Path, project: str, run_name: str) -> Any:
    wandb = _import_wandb(project)
    id_file = workdir / "wandb_id.txt"  # so that a resumed run goes on in the same one
    if not id_file.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(id_file, secrets.token_hex(4).encode())
    run = wandb.init(
        project=project,
        name=run_name,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=str(workdir),
    )
    # wandb ignores a step below its own counter, which a resume would run into.
    run.define_metric("*", step_metric="step")
    return run


def _import_wandb(project: str) -> Any:
    try:
        return importlib.import_module("wandb")  # an optional extra, slow to import
    except ImportError as error:
        raise InputError(
            f"config.logging.wandb_project={project} needs the package wandb, which "
            f"cannot be imported ({error}); pip install 'jaxllm[wandb]', or leave the "
            "setting out."
        ) from error

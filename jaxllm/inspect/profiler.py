# SPDX-License-Identifier: Apache-2.0
"""Profiles some steps of a run: a trace for other tools, and a table to read."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxllm.cluster.phases import Phases
from jaxllm.inspect.operations import read_operations
from jaxllm.inspect.timeline import format_timeline, share_time
from jaxllm.inspect.traces import read_events

FOLDER = "profile"  # in the run's directory
SKIPPED = 10  # steps before, which are slower than others
MODULE = "jit_train_step"
# Of XLA, for a program that is to be traced: in a CUDA graph no kernel has the name of
# its instruction.
TRACEABLE = {"xla_gpu_enable_command_buffer": ""}
_log = logging.getLogger(__name__)


class Profiler:
    """Traces some steps of a run, once in the life of a process.

    Its errors are warnings: no run ends because of its profile.

    Args:
      folder: where the trace and the table go; None traces nothing.
      program: the compiled step.
      phases: of this process.
      first: the first step to trace.
      number: of steps; 0 is none.
    """

    def __init__(
        self,
        folder: Path | None,
        program: jax.stages.Compiled,
        phases: Phases,
        *,
        first: int,
        number: int,
    ):
        self._folder = folder if number else None
        self._program, self._phases = program, phases
        self._first, self._last = first, first + number - 1
        self._is_tracing = False

    def before(self, step: int, state: Any) -> None:
        """Starts the trace before its first step, once the devices are idle."""
        if self._folder is None or self._is_tracing or step != self._first:
            return
        with self._phases("step"):
            jax.block_until_ready(state)
        with self._phases("other"), _warning():
            _start(self._folder)
            self._is_tracing = True

    def after(self, step: int, state: Any) -> None:
        """Ends the trace after its last step, and logs where the time went."""
        if self._folder is None or not self._is_tracing or step != self._last:
            return
        with self._phases("step"):
            jax.block_until_ready(state)
        folder, self._folder = self._folder, None
        with self._phases("other"), _warning():
            jax.profiler.stop_trace()
            self._is_tracing = False
            title = f"where the time of steps {self._first} to {self._last} went"
            number = self._last - self._first + 1
            text = explain(folder, self._program, number, title)
            path = folder / f"steps-{self._first}-{self._last}.txt"
            path.write_text(text + "\n")
            _log.info("%s\nThe trace it is from is under %s.", text, folder)

    def close(self) -> None:
        """Ends a trace that is under way, of fewer steps than asked for."""
        if self._is_tracing:
            self._is_tracing = False
            _log.warning("The steps to profile were cut short; their trace is kept.")
            with _warning():
                jax.profiler.stop_trace()


@contextlib.contextmanager
def trace(folder: Path) -> Iterator[None]:
    """Writes a trace of the devices under a folder; wait for them inside."""
    _start(folder)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def explain(
    folder: Path, program: jax.stages.Compiled, num_steps: int, title: str
) -> str:
    """Returns where the time of a trace's steps went, as tables.

    Args:
      folder: of `trace`.
      program: the compiled step that was traced, with the options TRACEABLE.
      num_steps: that were traced.
      title: of the first table.
    """
    operations = read_operations(program.as_text() or "")
    events = read_events(folder, MODULE, operations)
    timeline = share_time(events, operations, num_steps)
    return format_timeline(timeline, operations, f"{title}, on one device")


def _start(folder: Path) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the loop down, and nobody reads it
    jax.profiler.start_trace(str(folder), profiler_options=options)


@contextlib.contextmanager
def _warning() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the profiler, the disk, or a text we cannot read
        name = type(error).__name__
        _log.warning("The steps could not be profiled: %s: %s", name, error)

# SPDX-License-Identifier: Apache-2.0
"""The phases of a process: one at each moment, announced to listeners.

The ledger sums the seconds of each phase, and the watchdog's limits listen too: both
see the same boundaries.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

Phase = Literal[
    "start",  # imports, checks, opening the data, initial parameters
    "compile",
    "restore",
    "data_wait",  # waiting for the next batch
    "step",  # an update: its dispatch, and the wait for its metrics
    "eval",
    "save",  # the part of a checkpoint that the loop waits for
    "other",  # writing metrics; what callers do with the records of `train`
]
PHASES: tuple[Phase, ...] = get_args(Phase)
Listener = Callable[[Phase], None]


class Phases:
    """The phases of a process; their seconds add up to its whole life.

    A phase within another one interrupts it.

    Args:
      age_s: seconds already spent in the first phase, "start".
      clock: seconds, monotonic.

    Attributes:
      step: number of updates begun since the beginning of the run.
    """

    def __init__(
        self, *, age_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ):
        self.step = 0
        self._clock = clock
        self._listeners: list[Listener] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._now: Phase = "start"
        self._since_s = clock() - age_s

    @property
    def now(self) -> Phase:
        """The current phase."""
        return self._now

    @contextlib.contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Counts the time of the `with` block as this phase."""
        outer = self._now
        self.begin(phase)
        try:
            yield
        finally:
            self.begin(outer)

    def begin(self, phase: Phase) -> None:
        """Ends the current phase and begins another one."""
        now_s = self._clock()
        self._seconds[self._now] += now_s - self._since_s
        self._now, self._since_s = phase, now_s
        for listener in self._listeners:
            listener(phase)

    def each[T](self, items: Iterable[T]) -> Iterator[T]:
        """Yields items; each one restarts the current phase, to show progress."""
        for item in items:
            self.begin(self._now)
            yield item

    def listen(self, listener: Listener) -> None:
        """Calls listener with every phase from now on, in the thread that begins it."""
        self._listeners.append(listener)

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each phase so far; they add up to the age."""
        under_way = self._clock() - self._since_s
        return {**self._seconds, self._now: self._seconds[self._now] + under_way}


def process_age_s() -> float:
    """Returns the seconds since this process began; 0 if there is no /proc.

    Source: proc(5), field 22 of /proc/self/stat: clock ticks since the machine booted.
    """
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return 0.0
    fields = stat.read_text().rpartition(")")[2].split()  # from field 3 on
    began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began_s

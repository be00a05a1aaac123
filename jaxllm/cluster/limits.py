# SPDX-License-Identifier: Apache-2.0
"""The time limit of each phase of a run, learned from its past durations."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable

from jaxllm.cluster.phases import Phase, Phases

UNLIMITED: tuple[Phase, ...] = ("compile", "other")  # the others may wait for them
SLOW: tuple[Phase, ...] = ("start", "restore", "save")  # read or write a whole state
PATIENCE = 4  # times the floor: for slow phases, and for any that is new
MARGIN = 5  # times the longest of those remembered
REMEMBERED = 20
WARM_UP = 2  # times that a phase is new: devices find each other, caches fill


@dataclasses.dataclass(frozen=True)
class Doing:
    """The activity of the main thread: its phase, step, and start time."""

    phase: Phase
    step: int
    since_s: float


class Limits:
    """Records the durations of phases, and derives the limit of each.

    Args:
      phases: of this process.
      floor_s: the smallest limit; 0 turns all limits off.
      clock: seconds, monotonic.

    Attributes:
      now: the current activity; read by another thread.
    """

    def __init__(
        self,
        phases: Phases,
        floor_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._phases = phases
        self._floor_s = floor_s
        self._clock = clock
        self._took: dict[Phase, collections.deque[float]] = collections.defaultdict(
            lambda: collections.deque(maxlen=REMEMBERED)
        )
        self._adding: dict[Phase, tuple[int, float]] = {}  # step, seconds so far
        self.now = Doing(phases.now, phases.step, clock())
        phases.listen(self._begin)

    def limit_s(self, phase: Phase) -> float:
        """Returns the time limit of a phase in seconds; inf if it has none."""
        if phase in UNLIMITED or not self._floor_s:
            return math.inf
        took = self._took[phase]
        patient = phase in SLOW or len(took) < WARM_UP
        least_s = self._floor_s * (PATIENCE if patient else 1)
        return max(least_s, MARGIN * max(took, default=0.0))

    def _begin(self, phase: Phase) -> None:
        """Records the end of one phase and the beginning of the next."""
        ended, now_s = self.now, self._clock()
        self.now = Doing(phase, self._phases.step, now_s)
        # Separate parts of a step, such as its dispatch and the wait for its metrics,
        # count as one: the dispatch alone would take no time.
        step, seconds = self._adding.get(ended.phase, (ended.step, 0.0))
        if step != ended.step:
            self._took[ended.phase].append(seconds)
            seconds = 0.0
        self._adding[ended.phase] = (ended.step, seconds + now_s - ended.since_s)

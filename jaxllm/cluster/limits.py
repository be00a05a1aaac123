# SPDX-License-Identifier: Apache-2.0
"""How long each phase of a run may take, learned from how long it took."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable

from jaxllm.cluster.phases import Phase, Phases

UNLIMITED: tuple[Phase, ...] = ("compile", "other")  # others may wait for these
SLOW: tuple[Phase, ...] = ("start", "restore", "save")  # read or write a whole state
PATIENCE = 4  # times the floor: for slow phases, and for any that is new
MARGIN = 5  # times the longest of those remembered
REMEMBERED = 20
NEW = (
    2  # so often, a phase of this process is new: devices find each other, caches fill
)


@dataclasses.dataclass(frozen=True)
class Doing:
    """What the main thread does: the phase under way, when it began, and its step."""

    phase: Phase
    step: int
    since_s: float


class Limits:
    """Watches the phases of a process, and knows when one takes too long.

    Args:
      phases: of this process.
      floor_s: no limit is below this; 0 is no limit at all.
      clock: seconds, monotonic.

    Attributes:
      now: what is under way; read by another thread.
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
        self._adding: dict[Phase, tuple[int, float]] = {}  # step -> its seconds so far
        self.now = Doing(phases.now, phases.step, clock())
        phases.listen(self._begin)

    def limit_s(self, phase: Phase) -> float:
        """Returns the seconds that a phase may take, inf if it has no limit."""
        if phase in UNLIMITED or not self._floor_s:
            return math.inf
        took = self._took[phase]
        patient = phase in SLOW or len(took) < NEW
        least_s = self._floor_s * (PATIENCE if patient else 1)
        return max(least_s, MARGIN * max(took, default=0.0))

    def _begin(self, phase: Phase) -> None:
        """Notes the end of one phase and the beginning of the next."""
        ended, now_s = self.now, self._clock()
        self.now = Doing(phase, self._phases.step, now_s)
        # Parts of a step that are apart, such as giving it to the devices and waiting
        # for its numbers, are one: the first alone would take no time.
        step, seconds = self._adding.get(ended.phase, (ended.step, 0.0))
        if step != ended.step:
            self._took[ended.phase].append(seconds)
            seconds = 0.0
        self._adding[ended.phase] = (ended.step, seconds + now_s - ended.since_s)

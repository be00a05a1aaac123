# SPDX-License-Identifier: Apache-2.0
"""Times of device work, taken in turns so that a change of clocks hits all alike."""

import contextlib
import dataclasses
import fcntl
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MEASUREMENT_S = 0.02  # of device work between two readings of the clock
MOST_REPEATS = 200  # programs in the queue of the device at a time


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One implementation, ready to run: compiled, its inputs on the device."""

    run: Callable[[int], Any]  # enqueues repeat i; repeats differ in their inputs
    wait: Callable[[Any], Any]  # returns when all that was enqueued is done
    calls: int = 1  # of the operation in one run


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call, from the rounds of an entrant."""

    median_s: float
    low_s: float  # the fastest round
    high_s: float  # the slowest round
    rounds: int

    @property
    def spread(self) -> float:
        """The range of the rounds as a part of their median."""
        return (self.high_s - self.low_s) / self.median_s


@contextlib.contextmanager
def device_lock(folder: Path) -> Iterator[None]:
    """Keeps the other workers of a run off the device; a killed holder frees it."""
    with (folder / "device.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def time_in_turns(
    entrants: Mapping[str, Entrant],
    *,
    rounds: int,
    until: float,
    measurement_s: float = MEASUREMENT_S,
) -> dict[str, Timing]:
    """Returns the time of a call of each, from the median of their rounds.

    Args:
      entrants: by name.
      rounds: measurements of each; each round has one of all, in alternating order.
      until: `time.perf_counter()` after which no further round starts; the first
        always runs.
      measurement_s: least duration of a measurement.
    """
    repeats = {
        name: _repeats(entrant, measurement_s) for name, entrant in entrants.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in entrants}
    for turn in range(rounds):
        if turn and time.perf_counter() > until:
            break
        # Whoever comes after a hot kernel meets lower clocks: not always the same one.
        for name in list(entrants)[:: 1 if turn % 2 == 0 else -1]:
            seconds[name].append(_measure(entrants[name], repeats[name]))
    return {
        name: Timing(statistics.median(found), min(found), max(found), len(found))
        for name, found in seconds.items()
    }


def _repeats(entrant: Entrant, measurement_s: float) -> int:
    """Warms up, and returns how many runs fill a measurement."""
    entrant.wait(entrant.run(0))
    began = time.perf_counter()
    entrant.wait(entrant.run(0))
    if (one := time.perf_counter() - began) < measurement_s:
        one = entrant.calls * _measure(entrant, 3)  # less of it is the start
    return min(max(round(measurement_s / one), 1), MOST_REPEATS)


def _measure(entrant: Entrant, repeats: int) -> float:
    entrant.wait(entrant.run(0))  # the queue is empty, the code is in its cache
    began = time.perf_counter()
    last = None
    for i in range(repeats):
        last = entrant.run(i)
    entrant.wait(last)
    return (time.perf_counter() - began) / (repeats * entrant.calls)

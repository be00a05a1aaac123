# SPDX-License-Identifier: Apache-2.0
"""The time of a run by kind, from its first start to now, over all restarts.

A life is one process, from a start to its end, however it ends. `ledger.jsonl` has
lines of the seconds that a life has spent in each phase until then, and of the updates
that it has begun; the first line of a life begins it. What is lost or idle is in no
line: it follows from where the next life begins, and when.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from jaxllm.cluster.phases import PHASES, Phases
from jaxllm.records.json_lines import Append, open_jsonlines, read_jsonlines

FILE = "ledger.jsonl"
KINDS = (
    *PHASES,
    "lost",  # work that was done again: steps after the save that a life began from
    "idle",  # from the last sign of one life to the start of the next
)
_WORK = ("data_wait", "step", "eval", "save", "other")  # goes with the steps it is of

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Account:
    """The seconds of a run by kind, from the lines of its ledger.

    Attributes:
      lives: how often it was started.
      seconds: of each of KINDS; their sum is the time since the first start.
    """

    lives: int = 0
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(KINDS, 0.0)
    )

    def __post_init__(self):
        self._life: int | None = None  # that of the last line
        self._spent: Mapping[str, float] = {}  # by it, until then
        self._time_s = 0.0  # of the last line
        self._work: list[tuple[int, dict[str, float]]] = []  # by the step it led to

    @property
    def total_s(self) -> float:
        """The time since the first start."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time spent in steps that were not lost."""
        return self.seconds["step"] / self.total_s if self.total_s else 0.0

    def add(self, line: Mapping[str, Any]) -> None:
        """Takes the next line."""
        step, spent = line["step"], line["seconds"]
        if line["life"] != self._life:
            began_s = line["time"] - sum(spent.values())
            if self.lives:  # clocks of two machines may differ: not below 0
                self.seconds["idle"] += max(0.0, began_s - self._time_s)
            self.lives += 1
            self._life, self._spent = line["life"], {}
        self._lose_after(step)
        gained = {kind: spent[kind] - self._spent.get(kind, 0.0) for kind in spent}
        for kind, seconds in gained.items():
            self.seconds[kind] += seconds
        work = {kind: gained[kind] for kind in _WORK if gained.get(kind)}
        self._work.append((step, work))
        self._spent, self._time_s = spent, line["time"]

    def _lose_after(self, step: int) -> None:
        """Counts the work beyond a step, to which the run has rewound, as lost."""
        while self._work and self._work[-1][0] > step:
            for kind, seconds in self._work.pop()[1].items():
                self.seconds[kind] -= seconds
                self.seconds["lost"] += seconds

    def table(self) -> str:
        """Returns the account as lines of text."""
        total_s = self.total_s
        lives = "1 life" if self.lives == 1 else f"{self.lives} lives"
        rows = [f"{total_s:.1f} s in {lives}, goodput {self.goodput:.1%}"]
        rows += [
            f"  {kind:<10} {seconds:>12.1f} s {seconds / total_s:>7.1%}"
            for kind, seconds in self.seconds.items()
            if seconds
        ]
        return "\n".join(rows)


def read_ledger(workdir: Path) -> Account:
    """Returns the account of a run, as far as its file goes."""
    account, strange = Account(), 0
    for line in read_jsonlines(workdir / FILE):
        if _is_line(line):
            account.add(line)
        else:
            strange += 1
    if strange:
        _log.warning("%s: %d lines are not of a ledger.", workdir / FILE, strange)
    return account


def _is_line(line: Mapping[str, Any]) -> bool:
    spent = line.get("seconds")
    return (
        type(line.get("life")) is type(line.get("step")) is int
        and isinstance(spent, dict)
        and spent.keys() <= set(PHASES)
        and all(map(_is_seconds, [line.get("time"), *spent.values()]))
    )


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


class Ledger:
    """Writes the seconds of a life as phases end, but not too often.

    A line comes after 0.5 % of the life's time, and a minute at most: what a kill
    leaves without one counts as idle.

    Args:
      workdir: of the run; None is a process that writes nothing, and knows of no life
        but its own.
      phases: of this process.
      clock: seconds since the epoch.
    """

    def __init__(
        self,
        workdir: Path | None,
        phases: Phases,
        *,
        clock: Callable[[], float] = time.time,
    ):
        self._workdir = workdir
        self._phases = phases
        self._clock = clock
        self._resources = contextlib.ExitStack()
        self._append: Append | None = None
        self._account = Account()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._append is None:
            return
        try:
            self.write()
            _log.info("ledger: %s", self._account.table())
        except OSError:
            if error is None:
                raise
        finally:
            self._append = None
            self._resources.close()

    def begin(self, step: int) -> None:
        """Begins the account of this life, with the seconds spent before."""
        self._phases.step = step
        self._append = lambda line: None
        if self._workdir is not None:
            self._account = read_ledger(self._workdir)
            self._append = open_jsonlines(self._workdir / FILE, self._resources)
        self._life = self._account.lives
        # All lines of a life have one clock, which nobody sets while it lasts.
        self._began_s = self._clock() - sum(self._phases.seconds().values())
        self.write()
        self._phases.listen(lambda phase: self._write_if_due())

    def write(self) -> None:
        """Writes a line now: at a checkpoint, or a rewind to one."""
        assert self._append is not None, "`begin` comes first"
        self._written = self._phases.seconds()
        age_s = sum(self._written.values())
        line = {
            "life": self._life,
            "step": self._phases.step,
            "time": round(self._began_s + age_s, 3),
            "seconds": {name: round(s, 3) for name, s in self._written.items()},
        }
        self._append(line)
        self._account.add(line)

    def goodput(self) -> float:
        """Returns the goodput of the run until now."""
        seconds = self._phases.seconds()
        since = {name: seconds[name] - self._written[name] for name in seconds}
        total_s = self._account.total_s + sum(since.values())
        return (self._account.seconds["step"] + since["step"]) / total_s

    def _write_if_due(self) -> None:
        if self._append is None:
            return
        age_s = sum(self._phases.seconds().values())
        due_s = min(60.0, max(0.2, age_s / 200))
        if age_s - sum(self._written.values()) >= due_s:
            self.write()

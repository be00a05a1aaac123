# SPDX-License-Identifier: Apache-2.0
"""Which process keeps the others waiting, from what each of them does."""

import dataclasses
from collections.abc import Sequence

from jaxllm.cluster.peers import Identity, Message
from jaxllm.cluster.phases import Phase
from jaxllm.errors import RESUMABLE

# What a process has come to within the step that `Phases.step` names. An evaluation
# follows the update of that step; a save comes before it.
_ORDER: tuple[Phase, ...] = (
    *("start", "restore", "compile"),
    *("save", "data_wait", "step", "other", "eval"),
)
_DOING: dict[Phase, str] = {
    "start": "starting",
    "compile": "compiling",
    "restore": "restoring",
    "data_wait": "waiting for the data of step {}",
    "step": "in step {}",
    "eval": "evaluating after step {}",
    "save": "saving step {}",
    "other": "between two steps, after step {}",
}
_SHOWN = 8  # processes that a message lists


@dataclasses.dataclass(frozen=True)
class Sign:
    """The last sign of life of a process.

    Attributes:
      who: the process.
      phase: what it did.
      step: to which step it had come.
      age_s: for how long it had done it.
      where: the line of ours that its main thread was at.
      is_overdue: whether that was longer than it may take.
      silent_s: how long ago that was, if it should have said something since.
    """

    who: Identity
    phase: Phase = "start"
    step: int = 0
    age_s: float = 0.0
    where: str = ""
    is_overdue: bool = False
    silent_s: float = 0.0

    def message(self) -> Message:
        """Returns what is said to another process, which knows who says it."""
        said = dataclasses.asdict(self)
        return {name: said[name] for name in said.keys() - {"who", "silent_s"}}

    def __str__(self) -> str:
        where = f", at {self.where}" if self.where else ""
        doing = f"{_DOING[self.phase].format(self.step)} for {self.age_s:.1f} s{where}"
        if not self.silent_s:
            return f"{self.who} is {doing}"
        return (
            f"{self.who} has given no sign of life for {self.silent_s:.1f} s: it is "
            f"stopped or cut off, and was {doing}"
        )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why all processes end, and with which exit status.

    Attributes:
      reason: a sentence that names the process to blame.
      status: of every process.
      has_stacks: whether what each of them was doing matters.
    """

    reason: str
    status: int = RESUMABLE
    has_stacks: bool = False


def late(signs: Sequence[Sign]) -> list[Sign]:
    """Returns the processes that the others wait for; all if none is behind."""
    if silent := [sign for sign in signs if sign.silent_s]:
        return silent
    places = [(sign.step, _ORDER.index(sign.phase)) for sign in signs]
    first = min(places)
    return [sign for sign, place in zip(signs, places, strict=True) if place == first]


def judge(signs: Sequence[Sign]) -> Verdict | None:
    """Returns who is to blame for a process that has waited too long.

    None if the others wait for one that compiles: that may take any time.
    """
    blamed = late(signs)
    if any(sign.phase == "compile" and not sign.silent_s for sign in blamed):
        return None
    others = [sign for sign in signs if sign not in blamed]
    named = "; ".join(map(str, blamed[:_SHOWN]))
    if len(blamed) > _SHOWN:
        named += f"; and {len(blamed) - _SHOWN} more"
    if others:
        example = max(others, key=lambda sign: sign.age_s)
        reason = f"{named}. The others wait for it: {example}."
    elif len(signs) == 1:
        reason = f"{named}, which is too long."
    else:
        reason = f"no process is behind the others, and none goes on: {named}."
    return Verdict(reason, has_stacks=True)

# SPDX-License-Identifier: Apache-2.0
"""Decides which process is at fault when a run hangs."""

import dataclasses
from collections.abc import Sequence

from jaxllm.cluster.peers import Identity, Message
from jaxllm.cluster.phases import Phase
from jaxllm.errors import RESUMABLE

# The order of phases within the step that `Phases.step` names. An evaluation follows
# the update of that step; a checkpoint precedes it.
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
_SHOWN = 8  # processes listed in a message


@dataclasses.dataclass(frozen=True)
class Sign:
    """The last heartbeat of a process.

    Attributes:
      who: the process.
      phase: its phase.
      step: its step.
      age_s: seconds in that phase.
      where: the innermost source line of ours in its main thread.
      is_overdue: whether the phase exceeded its limit.
      silent_s: seconds since this heartbeat, if later ones are missing.
    """

    who: Identity
    phase: Phase = "start"
    step: int = 0
    age_s: float = 0.0
    where: str = ""
    is_overdue: bool = False
    silent_s: float = 0.0

    def message(self) -> Message:
        """Returns the message to another process, which knows the sender."""
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
    """The reason for which all processes end, and their exit status.

    Attributes:
      reason: a sentence that names the process at fault.
      status: of every process.
      has_stacks: whether each process writes its stacks.
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
    """Returns the verdict when a process is silent or has exceeded its limit.

    None if the others wait for a process that compiles: compilation has no limit.
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

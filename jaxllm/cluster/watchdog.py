# SPDX-License-Identifier: Apache-2.0
"""Ends a process that waits for what does not come, and says for whom it has waited.

A thread of its own looks on, because the main thread may be stuck inside a collective,
where no exception and no signal reaches it. Every process tells the leading one what it
does; the lead judges, and all end together. Nothing here waits for a disk or a network.
"""

import dataclasses
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jaxllm.cluster.aborts import say_last
from jaxllm.cluster.limits import Doing, Limits
from jaxllm.cluster.peers import Identity, Message, Peers, identity
from jaxllm.cluster.verdict import Sign, Verdict, judge
from jaxllm.errors import FAILED, RESUMABLE

STALLS = "stalls"  # in the run's directory: the stacks of every process
TICK_S = 0.2
BEATS = 20  # signs of life in the time after which a process counts as dead
MISSED = 3  # beats without a sign, until a process can be blamed for a stall
TRACES_S = 5.0  # for a disk to take the stacks
LAST_S = 3.0  # for the others to end, once they know that they must
_OURS = ("jaxllm.", "sharding.", "pallas_kernels.")
_GOES_ON = "The same command goes on from the newest save."


class Watchdog:
    """Watches this process, and those that it is connected with.

    Args:
      limits: of the phases of this process; None where it has none.
      silence_s: without a sign of life, until another process counts as dead.
      peers: the other processes, if there are any.
      say: writes the last words of this process.
      end: ends this process with a status.

    Attributes:
      workdir: where stacks are written; on standard error while it is None.
    """

    def __init__(
        self,
        limits: Limits | None,
        silence_s: float,
        *,
        peers: Peers | None = None,
        say: Callable[[str], Any] = say_last,
        end: Callable[[int], Any] = os._exit,
    ):
        self.workdir: Path | None = None
        self._limits = limits
        self._silence_s = silence_s
        self._beat_s = silence_s / BEATS
        self._say = say
        self._end = end
        self._peers = peers or Peers(identity(0), {})
        self._is_lead = self._peers.me.process == 0
        # By process: its last sign, and how long ago that came.
        self._signs = {who: Sign(who) for who in self._peers.connected}
        self._silent_s = dict.fromkeys(self._signs, 0.0)
        self._doing: Doing | None = None
        self._age_s = self._unsaid_s = self._stalled_s = 0.0
        self._leaving: tuple[int, str] | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def hear(self) -> None:
        """Waits a moment; does not return if another process is why this one fails."""
        self._thread.join(LAST_S)

    def leave(self, status: int, why: str) -> NoReturn:
        """Ends this process, after telling the others; the leading one ends last.

        JAX aborts whoever loses the leading process. Without a reason, the others are
        about to leave too; with one, they must.
        """
        self._leaving = (status, why)
        self._thread.join()
        raise AssertionError("the thread ends the process")

    def _watch(self) -> None:
        try:
            while True:
                began_s = time.monotonic()
                for peer, message in self._peers.receive(TICK_S):
                    self.take(peer, message)
                self.advance(time.monotonic() - began_s)
        except Exception:  # nobody else would see it
            self._say(traceback.format_exc())
            self._end(FAILED)

    def take(self, peer: Identity, message: Message | None) -> None:
        """Takes what another process says; None is the end of its connection."""
        if message is None:
            if self._signs.pop(peer, None) is not None:
                self._conclude(Verdict(f"{peer} died: its connection has ended."))
        elif "verdict" in message:
            self._conclude(Verdict(**message["verdict"]), message["stamp"])
        elif "left" in message:
            self._signs.pop(peer, None)
            if why := message["why"]:
                self._conclude(_left(peer, message["left"], why))
        elif peer in self._signs:
            self._signs[peer] = Sign(peer, **message)
            self._silent_s[peer] = 0.0

    def advance(self, seconds: float) -> None:
        """Lets time pass, and does what is due."""
        # Time in which this process was stopped, or starved, is nobody's fault.
        seconds = min(seconds, 5 * TICK_S)
        if self._leaving is not None:
            self._take_leave(*self._leaving)
        self._silent_s = {who: s + seconds for who, s in self._silent_s.items()}
        signs = [self._sign(seconds), *map(self._with_silence, self._signs.values())]
        self._unsaid_s += seconds
        if self._unsaid_s >= self._beat_s:
            self._unsaid_s = 0.0
            self._peers.send(signs[0].message())
        self._judge(signs, seconds)

    def _judge(self, signs: list[Sign], seconds: float) -> None:
        if any(sign.silent_s > self._silence_s for sign in signs):
            self._conclude(judge(signs))
        is_stalled = any(sign.is_overdue for sign in signs)
        self._stalled_s = self._stalled_s + seconds if is_stalled else 0.0
        # First it must be known what all of them do by now, and who says nothing. One
        # that does not lead waits for the lead's word, unless that is the silent one.
        settled_s = (MISSED + 2) * self._beat_s if self._signs else 0.0
        may_judge = self._is_lead or any(sign.silent_s for sign in signs)
        if is_stalled and may_judge and self._stalled_s >= settled_s:
            self._conclude(judge(signs))

    def _sign(self, seconds: float) -> Sign:
        """Returns this process's own sign of life, some seconds after the last one."""
        if self._limits is None:
            return Sign(self._peers.me)
        doing = self._limits.now
        self._age_s = self._age_s + seconds if doing is self._doing else 0.0
        self._doing = doing
        return Sign(
            self._peers.me,
            doing.phase,
            doing.step,
            self._age_s,
            where=_where(),
            is_overdue=self._age_s > self._limits.limit_s(doing.phase),
        )

    def _with_silence(self, sign: Sign) -> Sign:
        silent_s = self._silent_s[sign.who]
        is_silent = silent_s > MISSED * self._beat_s
        return dataclasses.replace(sign, silent_s=silent_s if is_silent else 0.0)

    def _take_leave(self, status: int, why: str) -> None:
        """Ends this process as it asked for; the lead waits for all others first."""
        if self._is_lead:
            if not why and self._signs:
                return
            if why:
                self._announce(_left(self._peers.me, status, why), _stamp())
        else:
            self._peers.send({"left": status, "why": why})
        if self._is_lead or why:
            self._await_others()
        self._end(status)

    def _conclude(self, verdict: Verdict | None, stamp: str | None = None) -> None:
        """Ends this process, and if it leads all others, for a reason."""
        if verdict is None:
            return
        stamp = stamp or _stamp()
        if self._is_lead:
            self._announce(verdict, stamp)
        if self._leaving is None:  # else it has given its own reason
            self._leave_traces(verdict, stamp)
        if self._is_lead:
            self._await_others()
        self._end(verdict.status)

    def _announce(self, verdict: Verdict, stamp: str) -> None:
        message = {"verdict": dataclasses.asdict(verdict), "stamp": stamp}
        self._peers.send(message)

    def _await_others(self) -> None:
        """Waits until those that can have ended, or this process is told to."""
        end_s, silent_s = time.monotonic() + LAST_S, MISSED * self._beat_s
        awaited = {who for who, s in self._silent_s.items() if s <= silent_s}
        while awaited & set(self._peers.connected) and time.monotonic() < end_s:
            for _, message in self._peers.receive(TICK_S):
                if message is not None and "verdict" in message:
                    return

    def _leave_traces(self, verdict: Verdict, stamp: str) -> None:
        """Writes why, and the stacks; whatever waits for a disk is left behind."""
        written: list[str] = []
        if verdict.has_stacks:
            name = f"{stamp}-process-{self._peers.me.process}.txt"
            arguments = (verdict.reason, self.workdir, name, written)
            _within(TRACES_S, _write_stacks, *arguments)
        lines = [f"error: {verdict.reason}", *written]
        if verdict.status == RESUMABLE:
            lines.append(_GOES_ON)
        _within(1.0, self._say, "\n".join(lines) + "\n")


def _left(who: Identity, status: int, why: str) -> Verdict:
    return Verdict(f"{who} ended with status {status}: {why}", status)


def _stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime())


def _where() -> str:
    """Returns the innermost line of ours that the main thread is at."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(_OURS):
            return f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _within(seconds: float, action: Callable[..., None], *arguments: Any) -> None:
    """Does something that may never end, and waits some seconds for it."""
    thread = threading.Thread(target=action, args=arguments, daemon=True)
    thread.start()
    thread.join(seconds)


def _write_stacks(
    reason: str, workdir: Path | None, name: str, written: list[str]
) -> None:
    """Writes the Python stacks of all threads, and notes where."""
    if workdir is None or not workdir.is_dir():
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        return
    path = workdir / STALLS / name
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        print(reason, file=file, flush=True)
        faulthandler.dump_traceback(file)
    written.append(f"What each thread of this process was doing: {path}")

# SPDX-License-Identifier: Apache-2.0
"""Ends a process that is stuck, and names the process it waited for.

It runs in its own thread, because the main thread may be stuck inside a collective,
where no exception and no signal reaches it. Every process sends heartbeats with its
phase to the lead; the lead decides, and all end together. Nothing here blocks on a disk
or a network.
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

STALLS = "stalls"  # folder in the run's directory, with the stacks of every process
TICK_S = 0.2
BEATS = 20  # heartbeats within the heartbeat timeout
MISSED = 3  # heartbeats that a process may miss before it can be blamed for a stall
TRACES_S = 5.0  # for writing the stacks to a disk
LAST_S = 3.0  # for the others to end, once they have the verdict
_OURS = ("jaxllm.", "sharding.", "pallas_kernels.")
_RESUMES = "The same command resumes from the newest save."


class Watchdog:
    """Watches this process and the processes it is connected to.

    Args:
      limits: of the phases of this process; None if they have none.
      silence_s: heartbeat timeout, after which another process counts as dead.
      peers: the connections to other processes, if any.
      say: writes the final message of this process.
      end: ends this process with a status.

    Attributes:
      is_alone: whether the run has no other process.
      workdir: where stacks are written; None writes them to standard error.
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
        self.is_alone = peers is None
        self.workdir: Path | None = None
        self._limits = limits
        self._silence_s = silence_s
        self._beat_s = silence_s / BEATS
        self._say = say
        self._end = end
        self._peers = peers or Peers(identity(0), {})
        self._is_lead = self._peers.me.process == 0
        # By process: its last heartbeat, and the seconds since.
        self._signs = {who: Sign(who) for who in self._peers.connected}
        self._silent_s = dict.fromkeys(self._signs, 0.0)
        self._doing: Doing | None = None
        self._age_s = self._unsaid_s = self._stalled_s = 0.0
        self._leaving: tuple[int, str] | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def hear(self) -> None:
        """Waits a moment; does not return if another process caused the failure."""
        self._thread.join(LAST_S)

    def leave(self, status: int, why: str) -> NoReturn:
        """Ends this process after telling the others; the lead ends last.

        JAX aborts every process that loses the lead. Without a reason, the others are
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
        """Handles a message of another process; None is a closed connection."""
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
        """Advances the clocks, sends a heartbeat if due, and checks all limits."""
        # Time in which this process was itself stopped or starved does not count.
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
        # Wait until all current phases are known, and who is silent. A process that
        # does not lead waits for the verdict of the lead, unless the lead is silent.
        settled_s = (MISSED + 2) * self._beat_s if self._signs else 0.0
        may_judge = self._is_lead or any(sign.silent_s for sign in signs)
        if is_stalled and may_judge and self._stalled_s >= settled_s:
            self._conclude(judge(signs))

    def _sign(self, seconds: float) -> Sign:
        """Returns this process's own heartbeat, some seconds after the last one."""
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
        """Ends this process as requested; the lead waits for all others first."""
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
        """Ends this process with a verdict and, if it leads, all others."""
        if verdict is None:
            return
        stamp = stamp or _stamp()
        if self._is_lead:
            self._announce(verdict, stamp)
        if self._leaving is None:  # otherwise it has given its own reason
            self._leave_traces(verdict, stamp)
        if self._is_lead:
            self._await_others()
        self._end(verdict.status)

    def _announce(self, verdict: Verdict, stamp: str) -> None:
        message = {"verdict": dataclasses.asdict(verdict), "stamp": stamp}
        self._peers.send(message)

    def _await_others(self) -> None:
        """Waits until the responsive processes have ended, or a verdict arrives."""
        end_s, silent_s = time.monotonic() + LAST_S, MISSED * self._beat_s
        awaited = {who for who, s in self._silent_s.items() if s <= silent_s}
        while awaited & set(self._peers.connected) and time.monotonic() < end_s:
            for _, message in self._peers.receive(TICK_S):
                if message is not None and "verdict" in message:
                    return

    def _leave_traces(self, verdict: Verdict, stamp: str) -> None:
        """Writes the reason and the stacks; gives up on a disk that hangs."""
        written: list[str] = []
        if verdict.has_stacks:
            name = f"{stamp}-process-{self._peers.me.process}.txt"
            arguments = (verdict.reason, self.workdir, name, written)
            _within(TRACES_S, _write_stacks, *arguments)
        lines = [f"error: {verdict.reason}", *written]
        if verdict.status == RESUMABLE:
            lines.append(_RESUMES)
        _within(1.0, self._say, "\n".join(lines) + "\n")


def _left(who: Identity, status: int, why: str) -> Verdict:
    return Verdict(f"{who} ended with status {status}: {why}", status)


def _stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime())


def _where() -> str:
    """Returns the innermost source line of ours in the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(_OURS):
            return f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _within(seconds: float, action: Callable[..., None], *arguments: Any) -> None:
    """Runs an action that may block forever, and waits some seconds for it."""
    thread = threading.Thread(target=action, args=arguments, daemon=True)
    thread.start()
    thread.join(seconds)


def _write_stacks(
    reason: str, workdir: Path | None, name: str, written: list[str]
) -> None:
    """Writes the Python stacks of all threads, and records the path."""
    if workdir is None or not workdir.is_dir():
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        return
    path = workdir / STALLS / name
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        print(reason, file=file, flush=True)
        faulthandler.dump_traceback(file)
    written.append(f"What each thread of this process was doing: {path}")

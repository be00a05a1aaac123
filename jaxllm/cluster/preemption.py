# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a run to stop, as a function that the loop can poll."""

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)


class Preempted(Exception):
    """The run was asked to stop, saved its state and can be resumed."""


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Catches SIGTERM, SIGUSR1, SIGHUP and Ctrl-C; yields whether one has come.

    Clusters send one of the first two before they preempt a machine. The loop polls
    between two steps, so that the state is complete when it is saved. A second Ctrl-C
    interrupts at once, and the newest checkpoint counts.
    """
    came: list[int] = []

    def note(number: int, frame) -> None:
        del frame
        if number == signal.SIGINT and number in came:
            raise KeyboardInterrupt
        came.append(number)
        name = signal.Signals(number).name
        _log.warning("%s: saving after this step, then stopping.", name)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, *hang_up())
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hang_up() -> tuple[int, ...]:
    """Returns SIGHUP, the end of a terminal, unless `nohup` said to ignore it."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return () if is_ignored else (signal.SIGHUP,)

# SPDX-License-Identifier: Apache-2.0
"""Ends the threads, tasks and coroutines that Orbax leaves after a failure.

Orbax 0.12 stops at the first array that fails. A thread that waits for the others waits
10 minutes more, and Python's exit for the thread. Coroutines that were never awaited,
and tasks of a closed event loop, are reported on standard error whenever they are
collected, long after the failure. To end the process instead would be too early: an
older checkpoint may be restored next, and `train` runs in its caller's program.

Remove this file once `assert_orbax_left_nothing` in tests/checkpoint/test_failures.py
passes without it.
"""

import asyncio
import contextlib
import gc
import threading
import types

import jax
from orbax.checkpoint._src.futures import future

_END_S = 10.0  # for a thread to end, once it waits for nothing


def end_leftovers() -> None:
    """Ends what failed saves and reads have left; none may be under way.

    Does nothing for several processes: they end together, without waiting for threads.
    """
    if jax.process_count() > 1:
        return
    threads = [
        t for t in threading.enumerate() if isinstance(t, future._SignalingThread)
    ]
    for thread in threads:
        # It sees that it is cancelled once its wait has ended, which nobody else ends.
        thread.cancel()
        future.set_signals(thread._receive_signals, operation_id=thread._operation_id)
    for thread in threads:
        with contextlib.suppress(BaseException):  # it failed, or was cancelled
            thread.join(_END_S)
    for left in gc.get_objects():
        if isinstance(left, asyncio.Task) and left.get_loop().is_closed():
            _forget(left)
        elif isinstance(left, types.CoroutineType) and _is_of_orbax(left):
            with contextlib.suppress(BaseException):  # its event loop is closed
                left.close()


def _forget(task: asyncio.Task) -> None:
    """Keeps a task from saying that nobody has waited for it."""
    task._log_destroy_pending = False  # pyright: ignore[reportAttributeAccessIssue]
    if task.done() and not task.cancelled():
        task.exception()


def _is_of_orbax(coroutine: types.CoroutineType) -> bool:
    return "/orbax/" in coroutine.cr_code.co_filename and not coroutine.cr_running

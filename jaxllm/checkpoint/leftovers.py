# SPDX-License-Identifier: Apache-2.0
"""What Orbax leaves behind where it fails: threads, tasks, coroutines.

It stops at the first write or array that fails. A thread that waits for what has failed
waits for 10 minutes more, and Python's exit for the thread. Coroutines that it had not
begun, and tasks of an event loop that is closed, are complained of on standard error
whenever they are collected, long after the failure.
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

    Of several processes nothing: they end together, and without waiting for threads.
    """
    if jax.process_count() > 1:
        return
    threads = [
        t for t in threading.enumerate() if isinstance(t, future._SignalingThread)
    ]
    for thread in threads:
        # It looks whether it is cancelled when its wait has ended, as now nobody else
        # would have it end.
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

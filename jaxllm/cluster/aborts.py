# SPDX-License-Identifier: Apache-2.0
"""JAX's abort: it must neither come before our last words, nor speak after them."""

import ctypes
import os
import signal


def delay_aborts() -> None:
    """Lets an abort of this process wait for 6 seconds.

    A thread of JAX aborts, in C++, as soon as the leading process is gone. The watchdog
    knows it as soon, but needs a moment to say who died and to end with a status that
    means it. The signal's number becomes the argument of `sleep`, which may be called
    in a handler (signal-safety(7)); as it returns, the abort goes on.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def say_last(text: str) -> None:
    """Writes to standard error, and lets nobody write there any more.

    The thread that aborts explains itself in eight lines, of which the last one names a
    file of XLA. A user looks at the end of a log, where our reason has to stand.
    """
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.write(stderr, text.encode())  # no lock, which a stuck thread may hold

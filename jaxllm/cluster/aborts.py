# SPDX-License-Identifier: Apache-2.0
"""Delays and silences JAX's abort, so that the watchdog's report ends the log."""

import ctypes
import os
import signal


def delay_aborts() -> None:
    """Delays an abort of this process by 6 seconds.

    A thread of JAX aborts, in C++, as soon as the leading process is gone. The watchdog
    notices just as early, but needs a moment to report who died and to exit with the
    right status. The signal's number becomes the argument of `sleep`, which is safe in
    a signal handler (signal-safety(7)); when it returns, the abort continues.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def say_last(text: str) -> None:
    """Writes to standard error and closes it to all later writes.

    JAX's aborting thread prints eight lines, the last of which names a file of XLA. A
    user looks at the end of a log, so our reason must come last.
    """
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.write(stderr, text.encode())  # no lock: a stuck thread may hold it

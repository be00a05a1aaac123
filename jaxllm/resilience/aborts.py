# SPDX-License-Identifier: Apache-2.0
"""JAX's abort, and the seconds before it in which a process can still end well."""

import ctypes
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

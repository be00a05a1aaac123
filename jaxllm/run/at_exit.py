# SPDX-License-Identifier: Apache-2.0
"""Closes what a program leaves open at its end, while threads can still be started.

`atexit` comes too late: Python has then ended the thread pools that a checkpoint needs.
"""

import concurrent.futures.thread  # noqa: F401 (its own end must come after ours)
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any

_open: weakref.WeakSet[Generator] = weakref.WeakSet()
_log = logging.getLogger(__name__)


def closed_at_exit[**P, G: Generator[Any, Any, Any]](
    make: Callable[P, G],
) -> Callable[P, G]:
    """Makes a generator function whose generators are closed before Python ends."""

    @functools.wraps(make)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> G:
        generator = make(*args, **kwargs)
        _open.add(generator)
        return generator

    return wrapped


def _close_all() -> None:
    for generator in list(_open):
        try:
            generator.close()
        except Exception as error:
            _log.error("at the end of the program: %s", error)


# Private, but the only hook at which threads still start; concurrent.futures uses it.
threading._register_atexit(_close_all)  # pyright: ignore[reportAttributeAccessIssue]

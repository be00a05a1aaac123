# SPDX-License-Identifier: Apache-2.0
"""Warns of what a program leaves open at its end, when it is too late to save it.

Python 3.12 starts no thread once it ends, before any hook that it offers, and a
checkpoint needs some.
"""

import contextlib
import functools
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any

_open: weakref.WeakSet[Generator] = weakref.WeakSet()
_log = logging.getLogger(__name__)


def missed_at_exit[**P, G: Generator[Any, Any, Any]](
    make: Callable[P, G],
) -> Callable[P, G]:
    """Makes a generator function that warns if a generator is open as Python ends."""

    @functools.wraps(make)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> G:
        generator = make(*args, **kwargs)
        _open.add(generator)
        return generator

    return wrapped


def _close_all() -> None:
    for generator in list(_open):
        if inspect.getgeneratorstate(generator) != inspect.GEN_SUSPENDED:
            continue
        _log.warning(
            "records of a training were left open at the end of the program: steps "
            "after the newest save are lost. Close them, with contextlib.closing."
        )
        with contextlib.suppress(Exception):
            generator.close()


# Private; `atexit` comes after modules that the closing needs have ended.
threading._register_atexit(_close_all)  # pyright: ignore[reportAttributeAccessIssue]

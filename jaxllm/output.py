# SPDX-License-Identifier: Apache-2.0
"""Standard output and error that may be closed, full, without a reader, or ASCII.

Standard library only.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

GOES_ON = "the command goes on without it"


class OutputError(OSError):
    """What a command is asked for cannot be written."""


@contextlib.contextmanager
def guarded(*, needed: bool) -> Iterator[None]:
    """Makes all text printable, and says what happens when output cannot be written.

    Characters that the encoding lacks are escaped. What was closed before the start is
    as if sent to /dev/null, or else the next file that is opened would get its text.

    Args:
      needed: raise OutputError when standard output is lost, for it is what the command
        is for; else a line on standard error says it, once.
    """
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    before = sys.stdout, sys.stderr
    sys.stderr = _Output(sys.stderr, lambda error: None)
    sys.stdout = _Output(sys.stdout, _refuse if needed else _tell)
    try:
        yield
    finally:
        with contextlib.suppress(OutputError):
            sys.stdout.flush()
        sys.stdout, sys.stderr = before


def _refuse(error: OSError) -> None:
    number = error.errno
    raise OutputError(
        number, f"standard output cannot be written: {error.strerror}"
    ) from error


def _tell(error: OSError) -> None:
    print(
        f"warning: standard output cannot be written: {error.strerror}; {GOES_ON}.",
        file=sys.stderr,
    )


class _Output:
    """A text stream that becomes /dev/null when it cannot be written.

    So Python's own flush at its exit, of what was not written, cannot fail.
    """

    def __init__(self, file: TextIO | None, when_lost: Callable[[OSError], None]):
        self._file: Any = file or open(os.devnull, "w")
        self._when_lost = when_lost
        if hasattr(self._file, "reconfigure"):
            self._file.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._losing():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losing():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.EINTR:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)
            self._when_lost(error)

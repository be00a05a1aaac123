# SPDX-License-Identifier: Apache-2.0
"""Files of numbers: tokens read part by part, boundaries read whole.

Parts are read with pread, not mapped: a file that is cut off, or a disk that fails,
under a mapping ends the process with SIGBUS and without a word.
"""

import os
import weakref

import numpy as np

from jaxllm.errors import InputError


class TokenFile:
    """The numbers of a file from an offset on, as a sequence that slices are read of.

    The file stays open: one that is replaced under a run is read as it was.
    """

    def __init__(self, path: str, dtype: np.dtype, offset: int = 0):
        self.path, self.dtype, self._offset = path, dtype, offset
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from error
        weakref.finalize(self, os.close, self._file)
        status = os.fstat(self._file)
        self.identity = status.st_dev, status.st_ino
        self._length = max(0, status.st_size - offset) // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        """Returns a part, read-only; raises InputError if the file has lost it."""
        start, stop, step = part.indices(self._length)
        assert step == 1, "files are read forwards"
        wanted = max(0, stop - start) * self.dtype.itemsize
        at, parts = self._offset + start * self.dtype.itemsize, []
        while wanted:
            try:
                read = os.pread(self._file, wanted, at)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if not read:
                raise InputError(
                    f"{self.path} was cut off while it was in use: it ends at byte "
                    f"{os.fstat(self._file).st_size}, and token {start} to {stop} are "
                    "needed. Copy it again; the same command resumes from the newest "
                    "checkpoint."
                )
            parts.append(read)
            at, wanted = at + len(read), wanted - len(read)
        return np.frombuffer(
            parts[0] if len(parts) == 1 else b"".join(parts), self.dtype
        )


def read_numbers(path: str, dtype: np.dtype) -> np.ndarray:
    """Returns all numbers of a file."""
    try:
        return np.fromfile(path, dtype)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_start(path: str, num_bytes: int) -> bytes:
    """Returns the first bytes of a file, fewer if it has no more."""
    try:
        with open(path, "rb") as file:
            return file.read(num_bytes)
    except OSError as error:
        raise _unreadable(path, error) from error


def check_ends(path: str, ends: np.ndarray, num_tokens: int, *, empty: bool):
    """Refuses ends of documents that do not increase up to the number of tokens.

    Args:
      path: of the file that they are from.
      ends: exclusive, in tokens.
      num_tokens: in the documents together.
      empty: documents may be empty, so that an end occurs twice.
    """
    steps = ends[1:] >= ends[:-1] if empty else ends[1:] > ends[:-1]
    last = int(ends[-1]) if len(ends) else 0
    first = int(ends[0]) if len(ends) else 0
    if last == num_tokens and first >= (not empty and len(ends) > 0) and steps.all():
        return
    raise InputError(
        f"{path} is damaged: the ends of documents must increase up to {num_tokens}, "
        f"the number of tokens, and go from {first} to {last}"
        f"{'' if steps.all() else ', not in order'}; copy it again, or make it again."
    )


def _unreadable(path: str, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read: {error.strerror}.")

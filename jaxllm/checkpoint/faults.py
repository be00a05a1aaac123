# SPDX-License-Identifier: Apache-2.0
"""Why a checkpoint cannot be read: it is damaged, or something else is wrong.

Only a damaged one may be passed over: the work since the one before it is done again.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jaxllm.errors import CheckpointError, DamagedError, describe_os_error

_OS_ERROR = re.compile(r"OS error (\d+)")  # TensorStore, in the text of a ValueError
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # a part that is not as written


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Makes a CheckpointError of what reading a step raises.

    Only of what JSON, Orbax and TensorStore raise for files and their content. Whatever
    else is raised, a TypeError or no memory, says nothing of the checkpoint.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError) as error:
        number = _errno(folder, error)
        if number is not None:
            why = describe_os_error(number, os.strerror(number))
            raise CheckpointError(f"{folder} cannot be read: {why}.") from error
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} was removed while it was read; run the same command again."
            ) from error
        raise DamagedError(
            f"{folder} is damaged: it cannot be read ({reason(error)})."
        ) from error


def reason(error: Exception) -> str:
    """Returns the first line of an error, to be put into a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _errno(folder: Path, error: Exception) -> int | None:
    """Returns the fault of the system behind an error, if it is one."""
    numbers = [int(number) for number in _OS_ERROR.findall(str(error))]
    if isinstance(error, OSError) and error.errno is not None:
        numbers.append(error.errno)
    numbers += _errnos_of_files(folder)  # Orbax does not say what it could not open
    return next((number for number in numbers if number not in _ABSENT), None)


def _errnos_of_files(folder: Path) -> Iterator[int]:
    faults: list[OSError] = []
    for place, _, names in os.walk(folder, onerror=faults.append):
        for name in names:
            try:
                with open(os.path.join(place, name), "rb") as file:
                    file.read(1)
            except OSError as error:
                faults.append(error)
    yield from (fault.errno for fault in faults if fault.errno is not None)

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
from jaxllm.files import parse_json

_OS_ERROR = re.compile(r"OS error (\d+)")  # TensorStore, in the text of a ValueError
_JSON = ("_METADATA", "_CHECKPOINT_METADATA")  # files of Orbax
_SHAPES = "array_metadatas"  # a folder of others
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
    except Exception as error:
        cause = _first_of_a_kind(error)
        if not isinstance(cause, OSError | ValueError | KeyError):
            raise
        number = _errno(folder, cause)
        if number is not None:
            why = describe_os_error(number, os.strerror(number))
            raise CheckpointError(f"{folder} cannot be read: {why}.") from error
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} was removed while it was read; run the same command again."
            ) from error
        raise DamagedError(
            f"{folder} is damaged: it cannot be read ({reason(cause)})."
        ) from error


def check_files(folder: Path) -> None:
    """Raises DamagedError for what Orbax would wait for or fail at in its own ways.

    A pipe would be waited for, and JSON that is none be an error of any type.
    """
    with reading(folder):
        for place, _, names in os.walk(folder):
            for path in (Path(place, name) for name in names):
                if not path.is_file():
                    raise DamagedError(f"{folder} is damaged: {path} is not a file.")
                is_json = path.name in _JSON or path.parent.name == _SHAPES
                if is_json and not isinstance(parse_json(path.read_bytes()), dict):
                    raise DamagedError(f"{folder} is damaged: {path} is not JSON.")


def reason(error: Exception) -> str:
    """Returns the first line of an error, to be put into a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _first_of_a_kind(error: Exception) -> Exception:
    """Returns what Orbax was told, if all that it raises itself is an Exception."""
    while type(error) is Exception and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


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
            path = Path(place, name)
            try:
                if path.is_file():
                    with path.open("rb") as file:
                        file.read(1)
            except OSError as error:
                faults.append(error)
    yield from (fault.errno for fault in faults if fault.errno is not None)

# SPDX-License-Identifier: Apache-2.0
"""How a command ends: its exit statuses, and the errors that need no traceback."""

import errno

FINISHED, FAILED, WRONG_INPUT, RESUMABLE = 0, 1, 2, 75  # exit statuses

_ADVICE = {
    errno.EACCES: "give a path that you may read and write",
    errno.EPERM: "give a path that you may read and write",
    errno.EROFS: "give a path on a file system that can be written",
    errno.ENOSPC: "nothing that was saved is lost: free some space and "
    "run the same command again",
    errno.EDQUOT: "nothing that was saved is lost: free some space and "
    "run the same command again",
    errno.EIO: "the disk or its server failed: run the same command again, and "
    "restore a copy if that fails too",
    errno.ESTALE: "its server replaced it meanwhile: run the same command again",
    errno.ENOENT: "it is not there: mount, move or copy it back",
    errno.EMFILE: "raise the limit of open files, as with `ulimit -n`",
    errno.ENFILE: "raise the limit of open files, as with `ulimit -n`",
}


class InputError(ValueError):
    """The user's input is wrong: entry points print it alone and exit with 2."""


class FullDiskError(OSError):
    """There is no room: no fault of the input, so entry points exit with 1."""


class CheckpointError(OSError):
    """A checkpoint cannot be written or read; the message says what to do."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was saved: the one before it counts."""


def describe_os_error(number: int | None, text: str | None) -> str:
    """Returns what an error of the system is, and what to do about it."""
    return f"{text}; {_ADVICE.get(number or 0, 'run the same command again')}"

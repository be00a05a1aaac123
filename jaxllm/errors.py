# SPDX-License-Identifier: Apache-2.0
"""How a command ends: its exit statuses, and the errors that need no traceback."""

FINISHED, FAILED, WRONG_INPUT, RESUMABLE = 0, 1, 2, 75  # exit statuses


class InputError(ValueError):
    """The user's input is wrong: entry points print it alone and exit with 2."""


class FullDiskError(OSError):
    """There is no room: no fault of the input, so entry points exit with 1."""


class CheckpointError(OSError):
    """A checkpoint cannot be written or read; the message says what to do."""

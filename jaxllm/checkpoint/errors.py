# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a save."""


class CheckpointError(OSError):
    """A checkpoint cannot be written or read; the message says what to do."""


def reason(error: Exception) -> str:
    """Returns the first line of an error, to be put into a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")

# SPDX-License-Identifier: Apache-2.0
"""Writes a token folder atomically: it appears complete or not at all.

Files are written into a hidden folder within the output. When all are complete they
move to their places, the manifest last. A command killed before that leaves only the
hidden folder; the next command empties it and starts over. A command killed during the
move leaves both; the next command for this output completes the move.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator

from jaxllm.data.manifest import (
    MANIFEST,
    PARTIAL,
    Manifest,
    read_manifest,
    write_manifest,
)
from jaxllm.errors import FullDiskError, InputError

_OLD = "replaced"  # within the hidden folder: the manifest of the overwritten files
_LOCK = "lock"


def finished(output: str) -> Manifest | None:
    """Returns the manifest of a finished output; None if there is none yet.

    Raises:
      InputError: if the output is a file, or a folder with other content.
    """
    if not os.path.lexists(output):
        return None
    if not os.path.isdir(output):
        raise InputError(f"--output={output} is a file; give a new or an empty folder.")
    with _explained(output):
        names = set(os.listdir(output))
    if MANIFEST in names:
        return read_manifest(output)
    if others := sorted(names - {PARTIAL}):
        raise InputError(
            f"--output={output} has files that are not tokens, such as {others[0]}, "
            "and would be mixed with them; give a new or an empty folder."
        )
    return None


def complete_move(output: str):
    """Completes the move of files that a killed command had begun, if any."""
    folder = os.path.join(output, PARTIAL)
    if os.path.exists(os.path.join(folder, MANIFEST)):
        with _explained(output), _locked(output, os.path.join(folder, _LOCK)):
            if os.path.exists(os.path.join(folder, MANIFEST)):
                _move(output)
                shutil.rmtree(folder)


@contextlib.contextmanager
def staged(output: str, *, replaces: Manifest | None) -> Iterator[str]:
    """Yields a hidden, empty folder for the files of an output, and locks it.

    Without a `commit` it is deleted. Disk errors become InputErrors.

    Args:
      replaces: the result of `finished`, which must still hold.
    """
    with _explained(output):
        is_new = not os.path.isdir(output)
        folder = os.path.join(output, PARTIAL)
        os.makedirs(folder, exist_ok=True)
        with _locked(output, os.path.join(folder, _LOCK)):
            try:
                if finished(output) != replaces:
                    raise _in_use(output)
                _empty(folder)
                yield folder
            finally:
                if not os.path.exists(os.path.join(folder, MANIFEST)):
                    shutil.rmtree(folder, ignore_errors=True)
                if is_new and not os.listdir(output):
                    os.rmdir(output)


def commit(output: str, manifest: Manifest):
    """Replaces the output's files by the staged files of a manifest."""
    old = set()
    if os.path.exists(os.path.join(output, MANIFEST)):
        old = set(read_manifest(output).files)
    for name in manifest.files:
        if name not in old and os.path.lexists(os.path.join(output, name)):
            raise InputError(
                f"--output={output} has a file {name} that is not its own and would be "
                "overwritten; move it away, or give another folder."
            )
    write_manifest(os.path.join(output, PARTIAL), manifest)
    _move(output)


def _move(output: str):
    """Moves staged files into place; can be interrupted anywhere and repeated."""
    folder = os.path.join(output, PARTIAL)
    names = read_manifest(folder).files
    replaced = os.path.join(folder, _OLD)
    if os.path.exists(os.path.join(output, MANIFEST)):
        os.makedirs(replaced, exist_ok=True)
        os.replace(os.path.join(output, MANIFEST), os.path.join(replaced, MANIFEST))
        _sync(output)
    if os.path.exists(replaced):
        for name in set(read_manifest(replaced).files) - set(names):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(output, name))
    for name in names:
        if os.path.exists(os.path.join(folder, name)):
            os.replace(os.path.join(folder, name), os.path.join(output, name))
    _sync(output)
    os.replace(os.path.join(folder, MANIFEST), os.path.join(output, MANIFEST))
    _sync(output)


@contextlib.contextmanager
def _locked(output: str, path: str) -> Iterator[None]:
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(output) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            print(
                f"warning: {output} cannot be locked on this file system; make sure "
                "that no other command writes to it.",
                file=sys.stderr,
            )
        yield


@contextlib.contextmanager
def _explained(output: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename or output
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise FullDiskError(
                f"--output={output} cannot be written: {place}: {error.strerror}; free "
                "some space, or give a folder on a larger disk, and run it again."
            ) from error
        raise InputError(
            f"--output={output} cannot be written: {place}: {error.strerror}; give a "
            "folder that can be written."
        ) from error


def _in_use(output: str) -> InputError:
    return InputError(
        f"--output={output} is being written by another command; wait for it, or give "
        "another folder."
    )


def _empty(folder: str):
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != _LOCK:
            os.unlink(entry.path)


def _sync(folder: str):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

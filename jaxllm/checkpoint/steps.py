# SPDX-License-Identifier: Apache-2.0
"""Which folders of a run are complete checkpoints, told without Orbax.

A step is `<folder>/<step>/`. It is written beside its place and renamed into it. Orbax
takes an empty folder with a number for a step (findings/orbax_empty_step.sh): here it
also needs all of `_PARTS`, and to say itself that it is this step of this run.
"""

import errno
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple

from jaxllm.checkpoint.label import read_label, read_run_id
from jaxllm.errors import CheckpointError, DamagedError, InputError, describe_os_error

CHECKPOINTS = "checkpoints"  # the folder of the steps in a run's directory

_PARTS = (  # of every whole step; hashes of the contents would be checked with them
    "commit_success.txt",
    "_CHECKPOINT_METADATA",
    "state/commit_success.txt",
    "state/_METADATA",
    "state/manifest.ocdbt",
    "state/d",
    "data/data.json",
)
_UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of a step while it is written
_log = logging.getLogger(__name__)


class Fault(NamedTuple):
    """Why a folder is no step of this run."""

    kind: Literal["unfinished", "incomplete", "damaged", "misplaced"]
    text: str


def find_steps(folder: Path) -> tuple[list[int], dict[Path, Fault]]:
    """Returns the complete steps, ascending, and the fault of each other folder.

    Raises:
      InputError: it is no folder that can be listed.
      CheckpointError: one of them cannot be read now, which does not make it wrong.
    """
    whole, faults, run = [], {}, read_run_id(folder.parent)
    for path in _list(folder):
        if path.name.endswith(_UNFINISHED):
            faults[path] = Fault("unfinished", "is an unfinished save")
        elif not _is_step(path):
            continue
        elif (fault := _fault(path, run)) is None:
            whole.append(int(path.name))
        elif path.exists():  # else retention has removed it while we looked
            faults[path] = fault
    return sorted(whole), faults


def set_aside(folder: Path, damaged: Collection[int] = ()) -> None:
    """Renames what looks like a step and is none, so that nothing counts it.

    Args:
      damaged: steps that are whole, but not as they were saved.
    """
    faults = {path: fault.kind for path, fault in find_steps(folder)[1].items()}
    faults |= {folder / str(step): "damaged" for step in damaged}
    for path, kind in faults.items():
        if kind == "unfinished":  # Orbax removes it
            continue
        aside = path.with_name(f"{path.name}.{kind}")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}+")
        path.rename(aside)
        _log.warning("%s is %s; it is now %s.", path, kind, aside)


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise InputError(
            f"{folder} is not a folder, and so none of checkpoints; move it elsewhere, "
            "or give another --workdir."
        ) from error
    except OSError as error:
        raise InputError(
            f"The checkpoints in {folder} cannot be listed: "
            f"{describe_os_error(error.errno, error.strerror)}."
        ) from error


def _is_step(path: Path) -> bool:
    return path.name.isascii() and path.name.isdigit() and path.is_dir()


def _fault(step: Path, run: str | None) -> Fault | None:
    if step.is_symlink():
        return Fault("misplaced", "is a link, and a save is a folder of its own")
    if missing := [part for part in _PARTS if not _has_content(step / part)]:
        text = f"is not a whole checkpoint: no {', '.join(missing)}"
        return Fault("incomplete", text)
    try:
        label = read_label(step)
    except DamagedError as error:
        return Fault("damaged", str(error).removeprefix(f"{step} ").rstrip("."))
    if str(label.step) != step.name:
        return Fault("misplaced", f"is a save of step {label.step}, under another name")
    if None not in (run, label.run) and label.run != run:
        return Fault("misplaced", "is a save of another run")
    return None


def _has_content(path: Path) -> bool:
    try:
        return any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False  # absent, or removed by retention while we look
        why = describe_os_error(error.errno, error.strerror)
        raise CheckpointError(f"{path} cannot be read: {why}.") from error

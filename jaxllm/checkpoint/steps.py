# SPDX-License-Identifier: Apache-2.0
"""Which folders of a run are complete checkpoints, told without Orbax.

A step is `<folder>/<step>/`. It is written beside its place and renamed into it. Orbax
takes an empty folder with a number for a step (findings/orbax_empty_step.sh): here it
also needs all of `_PARTS`.
"""

import logging
from collections.abc import Collection
from pathlib import Path

from jaxllm.errors import InputError

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


def find_steps(folder: Path) -> tuple[list[int], dict[Path, str]]:
    """Returns the complete steps, ascending, and the fault of each other folder."""
    whole, faults = [], {}
    for path in _list(folder):
        if path.name.endswith(_UNFINISHED):
            faults[path] = "is an unfinished save"
        elif _is_step(path):
            if missing := _missing_parts(path):
                faults[path] = f"is not a whole checkpoint: no {', '.join(missing)}"
            else:
                whole.append(int(path.name))
    return sorted(whole), faults


def set_aside(folder: Path, damaged: Collection[int] = ()) -> None:
    """Renames what looks like a step and is none, so that nothing counts it.

    Args:
      damaged: steps that are whole, but not as they were saved.
    """
    for path in _list(folder):
        if not _is_step(path):
            continue
        fault = "damaged" if int(path.name) in damaged else "incomplete"
        if fault == "damaged" or _missing_parts(path):
            aside = path.with_name(f"{path.name}.{fault}")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}+")
            path.rename(aside)
            _log.warning("%s is %s; it is now %s.", path, fault, aside)


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(
            f"The checkpoints in {folder} cannot be listed ({error.strerror}); make it "
            "a readable folder, or give another --workdir."
        ) from error


def _is_step(path: Path) -> bool:
    return path.name.isascii() and path.name.isdigit() and path.is_dir()


def _missing_parts(step: Path) -> list[str]:
    return [part for part in _PARTS if not _has_content(step / part)]


def _has_content(path: Path) -> bool:
    try:
        return any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0
    except OSError:  # absent, or removed by retention while we look
        return False

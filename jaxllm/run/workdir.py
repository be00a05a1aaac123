# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: its owner, its lock, and which settings may change."""

import contextlib
import dataclasses
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.cluster.watchdog import STALLS
from jaxllm.config import Config
from jaxllm.config.saved import compare_configs, read_values
from jaxllm.errors import InputError
from jaxllm.inspect.profiler import FOLDER

TOKENIZER = "tokenizer"
_OWN = (
    "config.json",
    "metrics.jsonl",
    "ledger.jsonl",
    STALLS,
    FOLDER,
    CHECKPOINTS,
    "tensorboard",
    "wandb_id.txt",
    TOKENIZER,
)
_LOCK = ".lock"
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def claim(workdir: Path, config: Config, *, overwrite: bool) -> Iterator[None]:
    """Locks a run's directory for this process, after comparing its config.json.

    Raises:
      InputError: the directory cannot be written, belongs to something else, is in use,
        or has a run of another model or seed.
    """
    _make(workdir)
    with _locked(workdir):
        _check_owner(workdir)
        if overwrite:
            _remove_run(workdir)
        _compare(workdir, config)
        yield


def _make(workdir: Path):
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--workdir={workdir} cannot be made ({error.strerror}); give a directory "
            "that you may write."
        ) from error
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise InputError(
            f"--workdir={workdir} cannot be written; give a directory that you may "
            "write."
        )


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    try:
        file = (workdir / _LOCK).open("a")
    except OSError as error:
        raise InputError(
            f"--workdir={workdir} cannot be written ({error.strerror}); give a "
            "directory that you may write."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"--workdir={workdir} is in use by another run; wait until it ends, or "
                "give another directory."
            ) from error
        yield


def _remove_run(workdir: Path):
    for name in _OWN:
        path = workdir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_owner(workdir: Path):
    config = read_values(workdir)
    if config is None:
        others = {path.name for path in workdir.iterdir()} - {_LOCK, *_OWN}
        if others:
            raise InputError(
                f"--workdir={workdir} has files but no run (no config.json), such as "
                f"{min(others)!r}; give a new or an empty directory."
            )
    elif not {"steps", "model", "data"} <= config.keys():
        raise InputError(
            f"--workdir={workdir} has a config.json that is not of a run; give a new "
            "or an empty directory."
        )


def _compare(workdir: Path, config: Config):
    before = read_values(workdir)
    if before is None:
        return
    errors, notes = compare_configs(before, dataclasses.asdict(config))
    for change in notes:
        _log.info("changed since this run began: %s", change)
    if errors:
        changes = "\n  - ".join(errors)
        raise InputError(
            f"--workdir={workdir} holds a run with another model or seed:"
            f"\n  - {changes}\n"
            "Go back to those settings, or give another --workdir, or "
            "--overwrite to delete it."
        )

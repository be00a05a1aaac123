# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: its owner, its lock, and which settings may change."""

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.checkpoint.label import RUN_ID
from jaxllm.checkpoint.steps import CHECKPOINTS, find_steps
from jaxllm.cluster.watchdog import STALLS
from jaxllm.config import Config
from jaxllm.config.saved import FILE as CONFIG
from jaxllm.config.saved import compare_configs, read_values
from jaxllm.errors import InputError, describe_os_error
from jaxllm.inspect.profiler import FOLDER as PROFILE
from jaxllm.records.json_lines import read_jsonlines
from jaxllm.records.ledger import FILE as LEDGER
from jaxllm.records.metrics import FILE as METRICS

TOKENIZER = "tokenizer"
_FILES = (CONFIG, METRICS, LEDGER, RUN_ID, "wandb_id.txt")
_FOLDERS = (CHECKPOINTS, STALLS, PROFILE, "tensorboard", TOKENIZER)
_LOCK = ".lock"
_ASIDE = ".set_aside"  # ends the name of what was in the way of a run
_OWN = re.compile(  # also of what a kill leaves half written
    rf"({'|'.join(map(re.escape, _FILES + _FOLDERS))})(\.\d+\.tmp|{_ASIDE}\+*)?"
)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
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
        _check_links(workdir)
        _compare(workdir, config)
        _clear_the_way(workdir)
        _warn_of_missing(workdir, config)
        yield


def _make(workdir: Path):
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(workdir, "made", error) from error
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise _refusal(
            workdir, "written", PermissionError(errno.EACCES, "no permission")
        )


def _refusal(workdir: Path, what: str, error: OSError) -> InputError:
    return InputError(
        f"--workdir={workdir} cannot be {what} ({error.strerror}); give a directory "
        "that you may write."
    )


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    path = workdir / _LOCK
    try:  # neither through a link nor waiting for the other end of a pipe
        mode = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(path, mode, 0o666)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{path} is not a plain file; remove it.") from error
        raise _refusal(workdir, "written", error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise InputError(
            f"--workdir={workdir} is in use by another run; wait until it ends, or "
            "give another directory."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(file)
            why = describe_os_error(error.errno, error.strerror)
            raise InputError(f"{path} cannot be locked: {why}.") from error
        _log.warning(
            "%s cannot be locked on its file system (%s); make sure that no other run "
            "has this directory.",
            workdir,
            error.strerror,
        )
    try:
        yield
    finally:
        os.close(file)


def _remove_run(workdir: Path):
    for path in workdir.iterdir():
        if not _OWN.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_owner(workdir: Path):
    config = read_values(workdir)
    if config is None:
        names = sorted(path.name for path in workdir.iterdir() if path.name != _LOCK)
        wrong = {path.name for path in _wrong_kinds(workdir)}
        others = [n for n in names if n in wrong or not _OWN.fullmatch(n)]
        if others:
            raise InputError(
                f"--workdir={workdir} has files but no run (no {CONFIG}), such as "
                f"{others[0]!r}; give a new or an empty directory."
            )
    elif not {"steps", "model", "data"} <= config.keys():
        raise InputError(
            f"--workdir={workdir} has a {CONFIG} that is not of a run; give a new or "
            "an empty directory."
        )


def _check_links(workdir: Path):
    """Refuses links: what a run writes, replaces and removes is in its directory."""
    for path in sorted(workdir.iterdir()):
        if path.is_symlink() and _OWN.fullmatch(path.name):
            raise InputError(
                f"{path} is a link to {os.readlink(path)}, and a run writes into its "
                "own directory only; move that here, or give a --workdir that lies "
                "there or is itself a link."
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


def _wrong_kinds(workdir: Path) -> list[Path]:
    """Returns files where a run has folders, and the other way round."""
    wrong = [workdir / name for name in _FILES if not (workdir / name).is_file()]
    wrong += [workdir / name for name in _FOLDERS if not (workdir / name).is_dir()]
    return [path for path in wrong if path.exists()]


def _clear_the_way(workdir: Path):
    for path in _wrong_kinds(workdir):
        _set_aside(path, "is not what a run has under this name")


def _warn_of_missing(workdir: Path, config: Config):
    """Says what was removed since the last start, and what follows."""
    steps, faults = find_steps(workdir / CHECKPOINTS)
    metrics = workdir / METRICS
    if steps and not (workdir / CONFIG).exists():
        _log.warning(
            "%s is missing, though there are saves: it is not known which settings "
            "this run had until now, and so not compared.",
            workdir / CONFIG,
        )
    if steps and not metrics.exists():
        _log.warning(
            "%s is missing: it has no records of the steps before %d from now on.",
            metrics,
            steps[-1],
        )
    if not steps and not faults:
        logged = max(map(_step_of, read_jsonlines(metrics)), default=0)
        if logged > config.checkpoint.every:  # else no save was due before a kill
            _set_aside(metrics, f"has step {logged}, but no save is left: all is anew")


def _step_of(record: Mapping[str, Any]) -> int:
    step = record.get("step")
    return step if isinstance(step, int) else 0


def _set_aside(path: Path, why: str):
    aside = path.with_name(f"{path.name}{_ASIDE}")
    while aside.exists() or aside.is_symlink():
        aside = aside.with_name(f"{aside.name}+")
    path.rename(aside)
    _log.warning("%s %s; it is now %s.", path, why, aside)

# SPDX-License-Identifier: Apache-2.0
"""The resolved config of a run, as JSON in its folder, and what may differ on resume.

Standard library only: a resume can be refused before JAX is imported.
"""

import errno
import json
import logging
from pathlib import Path
from typing import Any

from jaxllm.config.fields import setting_defaults
from jaxllm.config.files import config_from_dict, config_to_dict
from jaxllm.config.sections import Config
from jaxllm.errors import InputError, describe_os_error
from jaxllm.files import parse_json, write_whole

_log = logging.getLogger(__name__)

FILE = "config.json"
_HARMLESS = (  # same parameters, same tree on disk
    *("model.remat", "model.dtype", "model.moe.balance_weight"),
    *("model.moe.router_z_loss", "model.moe.capacity_factor"),
)


def read_config(workdir: Path) -> Config:
    """Returns the config that the run in `workdir` was last started with.

    Settings that are newer than the run have their defaults, with a warning.
    """
    values = read_values(workdir)
    if values is None:
        raise InputError(
            f"--workdir={workdir} holds no run: it has no {FILE}; give the directory "
            "of a run, or --config to start one."
        )
    path = Path(workdir) / FILE
    try:
        config = config_from_dict(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    filled = flatten(config_to_dict(config))
    if new := [name for name in filled if name not in flatten(values)]:
        added = ", ".join(f"config.{name}={filled[name]}" for name in new)
        _log.warning("%s was written before these settings: %s", path, added)
    return config


def read_values(workdir: Path) -> dict[str, Any] | None:
    """Returns the same as plain JSON, of whatever version wrote it; None if no run."""
    path = Path(workdir) / FILE
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise IsADirectoryError(errno.EISDIR, "It is not a plain file")
        config = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        why = describe_os_error(error.errno, error.strerror)
        raise InputError(f"{path} cannot be read: {why}.") from error
    except ValueError as error:
        raise InputError(_damaged(path)) from error
    if not isinstance(config, dict):
        raise InputError(_damaged(path))
    return config


def write_config(workdir: Path, config: Config) -> None:
    """Writes `config` into `workdir`: either all of it or, on a failure, nothing."""
    path = Path(workdir) / FILE
    text = json.dumps(config_to_dict(config), indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # no fault of the input
            error.filename = str(path)
            raise
        why = describe_os_error(error.errno, error.strerror)
        raise InputError(f"{path} cannot be written: {why}.") from error


def compare_configs(
    old: dict[str, Any], new: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Returns what forbids a resume under `new`, and what is only worth saying.

    Both are `dataclasses.asdict` of a Config, before or after a trip through JSON. A
    setting that the old one lacks had its default: it is worth saying, no more.
    """
    before, after, defaults = flatten(old), flatten(new), setting_defaults()
    errors, notes = [], []
    for name in sorted(before.keys() | after.keys()):
        values = [side[name] if name in side else "unset" for side in (before, after)]
        if values[0] == values[1]:
            continue
        change = f"config.{name}: {values[0]} -> {values[1]}"
        is_error = name == "seed" or (
            name.startswith("model.") and name not in _HARMLESS
        )
        if name not in before and name in defaults:
            is_error &= after[name] != json.dumps(defaults[name])
        (errors if is_error else notes).append(change)
    return errors, notes


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns dotted name -> JSON text, in which a tuple equals a list."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value)
    return flat


def _damaged(path: Path) -> str:
    return (
        f"{path} is not the JSON object that a run writes; restore it, or move it "
        "elsewhere to resume without comparing this config with the previous one."
    )

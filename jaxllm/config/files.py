# SPDX-License-Identifier: Apache-2.0
"""Configs from Python files, with overrides, and to and from JSON.

Standard library only. Whatever is wrong is an `InputError` that names the setting.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
import runpy
import traceback
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxllm.config.fields import (
    convert,
    read_text,
    section_names,
    setting_types,
    type_problems,
    unknown_setting,
)
from jaxllm.config.sections import Config
from jaxllm.errors import InputError

# A config file that ends the program has configured nothing, whatever its status.
_ENDS = (Exception, SystemExit, KeyboardInterrupt, GeneratorExit)

Overrides = Mapping[str, Any] | Iterable[tuple[str, Any]]


def load_config(path: str | os.PathLike[str], overrides: Overrides = ()) -> Config:
    """Returns what `get_config()` of a Python file makes, with overrides.

    Args:
      path: a .py file in any directory.
      overrides: see `override`.
    """
    path = Path(path)
    get_config = _run_config_file(path)
    try:
        config = get_config()
    except _ENDS as error:
        raise InputError(_explain(error, path)) from error
    if not isinstance(config, Config):
        raise InputError(
            f"{path}: get_config() returned {type(config).__name__}; it must return a "
            "jaxllm.config.Config."
        )
    check_types(config)
    return override(config, overrides)


def override(config: Config, overrides: Overrides) -> Config:
    """Returns the config with some settings replaced, and everything checked again.

    Args:
      config: stays as it is.
      overrides: keys such as "optimizer.lr", with Python values or their text. All are
        applied before anything is checked: settings that depend on each other can
        change together.
    """
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    kinds = setting_types()
    changes: dict[str, dict[str, Any]] = {}
    problems = []
    for key, value in pairs:
        name = str(key).removeprefix("config.")
        if name not in kinds:
            problems.append(unknown_setting(name))
            continue
        if isinstance(value, str):
            value = read_text(value, kinds[name])
        value = convert(value, kinds[name])
        problems += type_problems(value, kinds[name], f"config.{name}")
        section, _, field = name.rpartition(".")
        changes.setdefault(section, {})[field] = value
    _raise_problems(problems)
    return _replace(config, "", changes)


def check_types(section: Any):
    """Raises InputError for the fields of a Config or a section with wrong types.

    Dataclasses do not check types: a config file may say `steps="100"`.
    """
    kind = type(section)
    _raise_problems(type_problems(section, kind, section_names()[kind]))


def flatten(config: Config) -> dict[str, Any]:
    """Returns {"steps": 100, "optimizer.lr": 1e-3, ...}: overrides that make it."""
    flat = {}
    for name in setting_types():
        flat[name] = functools.reduce(getattr, name.split("."), config)
    return flat


def config_to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as JSON sees it: nested dicts, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))


def config_from_dict(values: Any) -> Config:
    """Returns the Config of `config_to_dict`; what is not there has its default.

    Raises:
      InputError: a setting is unknown, has a wrong value, or has no default.
    """
    return _section_from_dict(Config, values, "config")


def _replace(section: Any, name: str, changes: Mapping[str, dict[str, Any]]) -> Any:
    """Returns a section with its own changes and those of the sections inside it."""
    fields = dict(changes.get(name, {}))
    for field in dataclasses.fields(section):
        inner = f"{name}.{field.name}".removeprefix(".")
        if any(f"{other}.".startswith(f"{inner}.") for other in changes):
            fields[field.name] = _replace(getattr(section, field.name), inner, changes)
    return dataclasses.replace(section, **fields) if fields else section


def _section_from_dict(kind: type, values: Any, name: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{name}={values!r} must be an object with its settings.")
    hints = typing.get_type_hints(kind)
    fields, problems = {}, []
    for field, value in values.items():
        dotted = f"{name}.{field}"
        if field not in hints:
            problems.append(unknown_setting(dotted.removeprefix("config.")))
        elif dataclasses.is_dataclass(hints[field]):
            fields[field] = _section_from_dict(hints[field], value, dotted)
        else:
            fields[field] = convert(value, hints[field])
            problems += type_problems(fields[field], hints[field], dotted)
    problems += [
        f"{name}.{field.name} is missing, and has no default."
        for field in dataclasses.fields(kind)
        if field.name not in values and not _has_default(field)
    ]
    _raise_problems(problems)
    return kind(**fields)


def _has_default(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _raise_problems(problems: list[str]):
    if problems:
        raise InputError("\n".join(problems))


# From here on: running a config file, and saying where in it an error is.


def _run_config_file(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path} {_why_no_file(path)}")
    try:
        # Not imported: that would leave a compiled copy beside the user's file, which
        # is stale when the file changes twice within a second.
        get_config = runpy.run_path(str(path), run_name="config").get("get_config")
    except _ENDS as error:
        raise InputError(_explain(error, path)) from error
    if not callable(get_config):
        raise InputError(
            f"{path} has no get_config(); a config file is Python with a function "
            "`def get_config() -> Config`."
        )
    return get_config


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return "is a directory; give a config file, which ends in .py."
    names = [str(other) for other in path.parent.glob("*.py")]
    close = difflib.get_close_matches(str(path), names, n=1)
    hint = f"did you mean {close[0]}?" if close else "give the path of a .py file."
    return f"does not exist; {hint}"


def _explain(error: BaseException, path: Path) -> str:
    """Says in which line the file went wrong, and which setting if that is known."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}, line {error.lineno}: SyntaxError: {error.msg}."
    frames = list(traceback.walk_tb(error.__traceback__))
    lines = [line for frame, line in frames if frame.f_code.co_filename == str(path)]
    place = f"{path}, line {lines[-1]}" if lines else f"{path}"
    if isinstance(error, InputError):
        return f"{place}: {error}"
    if isinstance(error, OSError) and not lines:
        return f"{place} cannot be read: {error.strerror}."
    if isinstance(error, ModuleNotFoundError):
        return f"{place} imports {error.name}, which is not installed."
    if isinstance(error, SystemExit):
        return f"{place}: it exits with {error.code!r}; it must only define get_config."
    # A section compares its fields before `check_types` can see them.
    sections = [frame.f_locals.get("self") for frame, _ in frames]
    for section in sections:
        if type(section) in section_names() and (problems := _wrong_fields(section)):
            return f"{place}: " + "\n".join(problems)
    return f"{place}: {type(error).__name__}: {error}{_keyword_hint(str(error))}"


def _wrong_fields(section: Any) -> list[str]:
    try:
        return type_problems(section, type(section), section_names()[type(section)])
    except AttributeError:  # a field is not set yet
        return []


def _keyword_hint(message: str) -> str:
    unknown = r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'"
    if match := re.match(unknown, message):
        for section, name in section_names().items():
            if section.__name__ == match[1]:
                dotted = f"{name}.{match[2]}".removeprefix("config.")
                return f"; {unknown_setting(dotted)}"
    return ""

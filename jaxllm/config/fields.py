# SPDX-License-Identifier: Apache-2.0
"""The settings as data: names, types, defaults, comments; and values by type."""

import ast
import dataclasses
import decimal
import difflib
import inspect
import io
import math
import numbers
import sys
import tokenize
import types
import typing
from typing import Any, Literal

from jaxllm.config.sections import Config


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a section, as docs/settings.md and `--help` show it."""

    name: str  # such as config.optimizer.lr
    type: str  # such as float, or "cosine" | "linear"
    default: str | None  # as source text; None is required
    doc: str  # its trailing comment in sections.py or model.py


def settings() -> list[Setting]:
    """Returns all settings in order of their sections, read from the source."""
    modules = dict.fromkeys(section.__module__ for section in section_names())
    lines = {}
    for module in modules:
        lines |= _lines(inspect.getsource(sys.modules[module]))
    owners = {name: section.__name__ for section, name in section_names().items()}
    found = []
    for name, kind in setting_types().items():
        section, _, field = f"config.{name}".rpartition(".")
        default, doc = lines[f"{owners[section]}.{field}"]
        found.append(Setting(f"config.{name}", type_name(kind), default, doc))
    return found


def setting_types() -> dict[str, Any]:
    """Returns the annotation of every setting: {"steps": int, "model.mlp": ...}."""
    return {
        f"{name}.{field}".removeprefix("config."): kind
        for section, name in section_names().items()
        for field, kind in typing.get_type_hints(section).items()
        if not dataclasses.is_dataclass(kind)
    }


def setting_defaults() -> dict[str, Any]:
    """Returns the default of every setting that has one: {"seed": 0, ...}."""
    return {
        f"{name}.{field.name}".removeprefix("config."): field.default
        for section, name in section_names().items()
        for field in dataclasses.fields(section)
        if field.default is not dataclasses.MISSING
        and not dataclasses.is_dataclass(field.default)
    }


def section_names() -> dict[type, str]:
    """Returns {Config: "config", ModelConfig: "config.model", ...}, in their order."""
    names: dict[type, str] = {}

    def add(section: type, name: str):
        names[section] = name
        for field, kind in typing.get_type_hints(section).items():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                add(kind, f"{name}.{field}")

    add(Config, "config")
    return names


def unknown_setting(name: str) -> str:
    """Returns the message for a name such as "optimizer.lrr" that is no setting."""
    names = list(setting_types())
    if inside := [other for other in names if other.startswith(f"{name}.")]:
        return (
            f"config.{name} is a section, not a setting; set one of "
            f"{', '.join(f'config.{other}' for other in inside)}."
        )
    leaf = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    close = close or [other for other in names if other.rpartition(".")[2] == leaf]
    close = close or difflib.get_close_matches(name, names, n=1)
    if close:
        choices = " or ".join(f"config.{other}" for other in close)
        return f"config.{name} is not a setting; did you mean {choices}?"
    return f"config.{name} is not a setting; docs/settings.md lists them all."


def type_name(kind: Any) -> str:
    """Returns a type annotation as its source text, a Literal as its values."""
    if typing.get_origin(kind) is Literal:
        return " | ".join(f'"{choice}"' for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"tuple[{type_name(typing.get_args(kind)[0])}, ...]"
    if isinstance(kind, types.UnionType):
        return " | ".join(type_name(choice) for choice in typing.get_args(kind))
    return "None" if kind is types.NoneType else kind.__name__


def read_text(text: str, kind: Any) -> Any:
    """Returns the value of this type that the text means, or the text if none."""
    choices = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if text.lower() in ("none", "null") else read_text(text, choices[0])
    if typing.get_origin(kind) is tuple:
        return tuple(read_text(part, choices[0]) for part in _parts(text))
    try:
        return _READERS[kind](text) if kind in _READERS else text
    except (ValueError, KeyError, decimal.InvalidOperation):
        return text


def convert(value: Any, kind: Any) -> Any:
    """Returns a list as a tuple, a whole number as a float, NumPy's as Python's.

    Only where the type asks for it; any other value is returned as it is.
    """
    choices = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return convert(value, choices[0])
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(convert(part, choices[0]) for part in value)
    number = {int: numbers.Integral, float: numbers.Real}.get(kind)
    if number and isinstance(value, number) and not isinstance(value, bool):
        try:
            return kind(value)
        except OverflowError:  # an integer that no float holds
            return math.inf
    return value


def type_problems(value: Any, kind: Any, name: str) -> list[str]:
    """Returns a message for each value in `value` that is not as its type says."""
    if dataclasses.is_dataclass(kind) and type(value) is kind:
        return [
            problem
            for field, inner in typing.get_type_hints(kind).items()
            for problem in type_problems(
                getattr(value, field), inner, f"{name}.{field}"
            )
        ]
    if _is_a(value, kind):
        return []
    rule, end = type_name(kind), "."
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        rule = "one of " + ", ".join(choices)
        close = difflib.get_close_matches(
            _shown(value).strip("'").lower(), choices, n=1
        )
        end = f"; did you mean {close[0]}?" if close else "."
    elif typing.get_origin(kind) is tuple and not isinstance(value, tuple):
        end = f", such as ({_shown(value)},)."
    return [f"{name}={_shown(value)} must be {rule}{end}"]


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number of thousands of digits"


def _is_a(value: Any, kind: Any) -> bool:
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return value in choices
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(x, choices[0]) for x in value)
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, choice) for choice in choices)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int) and value.bit_length() > sys.float_info.max_exp:
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _lines(source: str) -> dict[str, tuple[str | None, str]]:
    """Returns the default and the comment of each field in a source: "Config.steps"."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        f"{owner.name}.{ast.unparse(line.target)}": (
            ast.get_source_segment(source, line.value) if line.value else None,
            comments.get(line.end_lineno or line.lineno, ""),
        )
        for owner in ast.parse(source).body
        if isinstance(owner, ast.ClassDef)
        for line in owner.body
        if isinstance(line, ast.AnnAssign)
    }


def _parts(text: str) -> list[str]:
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    parts = [part.strip().strip("'\"") for part in text.split(",")]
    return parts if parts[-1] else parts[:-1]


def _read_int(text: str) -> int:
    number = decimal.Decimal(text)
    if not math.isfinite(float(number)) or number != number.to_integral_value():
        raise ValueError(text)
    return int(number)


def _read_bool(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


_READERS = {int: _read_int, float: float, bool: _read_bool}

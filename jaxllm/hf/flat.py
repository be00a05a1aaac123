# SPDX-License-Identifier: Apache-2.0
"""The settings of a model by their names with dots, and back."""

import dataclasses
from typing import Any

from jaxllm.config import (
    ModelConfig,
    MoEConfig,
    MoEVariantConfig,
    RopeConfig,
    VariantConfig,
)
from jaxllm.config.files import check_types
from jaxllm.errors import InputError
from jaxllm.hf.rope import Settings

# An inner section before the one that it is part of.
_SECTIONS = {
    "moe.variant": MoEVariantConfig,
    "moe": MoEConfig,
    "rope": RopeConfig,
    "variant": VariantConfig,
}


def build(settings: Settings, place: str) -> ModelConfig:
    """Returns the model of settings by their names.

    Args:
      settings: such as {"d_model": 64, "moe.variant.groups": 2}.
      place: of the file that they come from, for errors.

    Raises:
      InputError: a value is not one of its setting.
    """
    sections: dict[str, dict[str, Any]] = {name: {} for name in ("", *_SECTIONS)}
    for name, value in settings.items():
        section, _, field = name.rpartition(".")
        sections[section][field] = value
    try:
        for name, kind in _SECTIONS.items():
            section = kind(**sections[name])
            check_types(section)
            outer, _, field = name.rpartition(".")
            sections[outer][field] = section
        model = ModelConfig(**sections[""])
        check_types(model)
    except (InputError, TypeError) as error:
        raise InputError(f"{place}: {error}") from error
    return model


def flatten(section: Any, prefix: str = "") -> Settings:
    """Returns the settings of a section and of those within it, by their names."""
    flat: Settings = {}
    for field in dataclasses.fields(section):
        name, value = prefix + field.name, getattr(section, field.name)
        inner = dataclasses.is_dataclass(value)
        flat |= flatten(value, f"{name}.") if inner else {name: value}
    return flat

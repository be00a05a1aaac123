# SPDX-License-Identifier: Apache-2.0
"""The scaling of RoPE in a config.json: read, and written for transformers 4 and 5."""

import math
from typing import Any

from jaxllm.config import RopeConfig

Settings = dict[str, Any]  # of ModelConfig, by dotted name


def _read_default(given: dict[str, Any], length, before) -> Settings:
    for key in ("factor", "attention_factor", "original_max_position_embeddings"):
        given.pop(key, None)  # without effect where nothing is scaled
    return {}


def _read_linear(given: dict[str, Any], length, before) -> Settings:
    given.pop("original_max_position_embeddings", None)
    return {"rope.scaling": "linear", "rope.factor": float(given.pop("factor"))}


def _read_llama3(given: dict[str, Any], length, before) -> Settings:
    return {
        "rope.scaling": "llama3",
        "rope.factor": float(given.pop("factor")),
        "rope.slow": float(given.pop("low_freq_factor")),
        "rope.fast": float(given.pop("high_freq_factor")),
        "rope.original_length": given.pop("original_max_position_embeddings", length),
    }


def _read_yarn(given: dict[str, Any], length, before) -> Settings:
    original = given.pop("original_max_position_embeddings", None) or length
    factor = given.pop("factor", None) or length / original
    magnitude = given.pop("attention_factor", None)
    one, whole = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if magnitude is None:
        if one and whole:
            magnitude = _yarn_magnitude(factor, one) / _yarn_magnitude(factor, whole)
        else:
            magnitude = _yarn_magnitude(factor, 1.0)
    return {
        "rope.scaling": "yarn",
        "rope.factor": float(factor),
        "rope.original_length": original,
        "rope.slow": float(given.pop("beta_slow", None) or 1.0),
        "rope.fast": float(given.pop("beta_fast", None) or 32.0),
        "rope.truncate": given.pop("truncate", True),
        "rope.magnitude": float(magnitude),
    }


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_longrope(given: dict[str, Any], length, before) -> Settings:
    inside = given.pop("original_max_position_embeddings", None)
    original = before or inside or length
    factor = given.pop("factor", None)
    scale = length / original if before or factor is None else factor
    magnitude = given.pop("attention_factor", None)
    if magnitude is None:
        magnitude = 1.0
        if scale > 1:
            magnitude = math.sqrt(1 + math.log(scale) / math.log(original))
    return {
        "rope.scaling": "longrope",
        "rope.factor": float(scale),
        "rope.original_length": original,
        "rope.short_factors": tuple(map(float, given.pop("short_factor"))),
        "rope.long_factors": tuple(map(float, given.pop("long_factor"))),
        "rope.magnitude": float(magnitude),
    }


SCALINGS = {
    "default": _read_default,
    "linear": _read_linear,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
}


def write_scaling(rope: RopeConfig) -> dict[str, Any]:
    """Returns the keys of a scaling, without theta and type."""
    match rope.scaling:
        case "linear":
            return {"factor": rope.factor}
        case "llama3":
            return {
                "factor": rope.factor,
                "low_freq_factor": rope.slow,
                "high_freq_factor": rope.fast,
                "original_max_position_embeddings": rope.original_length,
            }
        case "yarn":
            return {
                "factor": rope.factor,
                "beta_slow": rope.slow,
                "beta_fast": rope.fast,
                "truncate": rope.truncate,
                "attention_factor": rope.magnitude,
                "original_max_position_embeddings": rope.original_length,
            }
        case "longrope":
            return {
                "short_factor": list(rope.short_factors),
                "long_factor": list(rope.long_factors),
            }
    return {}

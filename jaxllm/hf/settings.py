# SPDX-License-Identifier: Apache-2.0
"""config.json to ModelConfig, by the table of a family."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.errors import InputError
from jaxllm.hf.families import FAMILIES
from jaxllm.hf.flat import build
from jaxllm.hf.layers import read_sparse, shortest
from jaxllm.hf.quantized import without_quantization
from jaxllm.hf.rope import SCALINGS, Settings
from jaxllm.hf.table import DROPOUTS, IGNORED, Family

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
PART = "partial_rotary_factor"


def read_model(config: Mapping[str, Any], place: str) -> tuple[str, ModelConfig]:
    """Returns the model_type and the settings of a config.json.

    Args:
      config: its content.
      place: of the file, for errors.

    Raises:
      InputError: the family, or a setting of it, cannot be honoured.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"{place}: model_type={model_type!r} is not a family that can be read; "
            f"known are {', '.join(sorted(FAMILIES))}."
        )
    _check_architectures(config, place)
    config = without_quantization(config, FAMILIES[model_type].quantized, place)
    reader = _Reader(FAMILIES[model_type], config, place)
    try:
        settings = reader.read()
    except KeyError as error:
        raise InputError(f"{place}: {error.args[0]} is missing.") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place}: a setting has a wrong value ({error}).") from error
    reader.check_all_read()
    return model_type, build(settings, place)


def _check_architectures(config: Mapping[str, Any], place: str) -> None:
    """Refuses a model with another head, whatever its model_type."""
    named = config.get("architectures") or []
    ends = ("ForCausalLM", "LMHeadModel", "Model")
    if not isinstance(named, list) or not all(str(x).endswith(ends) for x in named):
        raise InputError(
            f"{place}: architectures={named!r} is not of a language model; give the "
            "folder of one."
        )
    code = config.get("auto_map") or {}
    name = code.get("AutoModelForCausalLM") if isinstance(code, dict) else code
    ours = FAMILIES[config["model_type"]].architecture
    if name and str(name).rpartition(".")[2] != ours:
        raise InputError(
            f"{place}: auto_map={name!r} is code of the folder, which is not run, and "
            f"another class than {ours}; remove auto_map if the model is plain "
            f"{config['model_type']}."
        )


@dataclasses.dataclass
class _Reader:
    """Reads keys of a config.json, and remembers which."""

    family: Family
    config: Mapping[str, Any]
    place: str

    def __post_init__(self):
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key; where it is absent or null, the default."""
        self._read.add(key)
        value = self.config.get(key)
        if other := self.family.aliases.get(key):
            self._read.add(other)
            again = self.config.get(other)
            if None not in (value, again) and value != again:
                raise InputError(
                    f"{self.place}: {key}={value} and {other}={again} say the same "
                    "setting twice; remove the wrong one."
                )
            value = again if value is None else value
        if value is None:
            value = self.family.defaults.get(key, default)
        return value

    def read(self) -> Settings:
        settings: Settings = {"norm": "rmsnorm", "bias": "none", "dtype": self._dtype()}
        for name, key in self.family.keys.items():
            inverse = key.startswith("1/")
            value = self.get(key.removeprefix("1/"))
            # A soft cap or chunk that is null is none, whatever the class's default.
            off = self.config.get(key, "absent") is None
            if name.endswith(("softcap", "attention_chunk")) and (off or value is None):
                continue
            if inverse and value is not None:
                value = 1 / value
            if key == "query_pre_attn_scalar" and value is not None:
                value = value**-0.5
            settings[name] = value
        settings |= self._derived(settings)
        settings |= self.family.fixed
        if settings.get("variant.embedding_scale") == "sqrt(d_model)":
            settings["variant.embedding_scale"] = math.sqrt(settings["d_model"])
        settings |= {"mlp": self._activation()} | self._bias()
        settings["windows"] = windows = self._windows(settings["num_layers"])
        settings |= self._rope(settings, windows)
        if self.family.windows == "chunks":
            self._check_layers(settings)
        settings["windows"] = shortest(windows)
        return settings | self._sparse(settings)

    def check_all_read(self) -> None:
        """Refuses a key that was not read and might change a result."""
        family = self.family
        for key, allowed in family.requires.items():
            value = self.config.get(key, allowed[0])
            if value not in allowed:
                raise InputError(
                    f"{self.place}: {key}={value!r} cannot be honoured; only "
                    f"{' or '.join(map(repr, allowed))} can."
                )
        known = self._read | IGNORED | set(DROPOUTS) | set(family.ignored)
        for key in self.config.keys() - known - family.requires.keys():
            if self.config[key] is not None:
                raise InputError(
                    f"{self.place}: {key}={self.config[key]!r} is not known of "
                    f"model_type={self.config['model_type']}, and might change its "
                    "results; remove it if it does not."
                )

    def _sparse(self, settings: Settings) -> Settings:
        """Returns which layers have experts, or the width of a model without any."""
        if not settings.get("moe.num_experts") and self.family.dense_width:
            for name in [name for name in settings if name.startswith("moe.")]:
                del settings[name]
            return {"d_ff": self.get(self.family.dense_width)}
        cycles = len(settings["windows"]), len(settings["rope.layers"])
        rule, number = self.family.sparse, settings["num_layers"]
        return read_sparse(rule, self.get, number, math.lcm(*cycles))

    def _dtype(self) -> str:
        """Returns the dtype to compute in: float32 models keep their numbers."""
        said = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        return "float32" if said == "float32" else "bfloat16"

    def _derived(self, settings: Settings) -> Settings:
        """Returns what has a value by others if its key is absent."""
        for name in ("d_model", "num_heads", "num_layers", "vocab_size"):
            if not isinstance(settings.get(name), int):
                key = self.family.keys[name]
                raise InputError(f"{self.place}: {key} is missing or no whole number.")
        derived: Settings = {}
        if settings.get("num_kv_heads") is None:
            derived["num_kv_heads"] = settings["num_heads"]
        if settings.get("head_dim") is None:
            derived["head_dim"] = settings["d_model"] // settings["num_heads"]
        if settings.get("d_ff") is None:
            derived["d_ff"] = 4 * settings["d_model"]
        if self.config["model_type"] == "gpt_neox":
            parallel = self.get("use_parallel_residual")
            derived["variant.parallel"] = "two_norms" if parallel else "none"
        return derived

    def _activation(self) -> str:
        key = self.family.activation_key
        name = self.get(key, next(iter(self.family.activations)))
        if name not in self.family.activations:
            raise InputError(
                f"{self.place}: {key}={name!r} cannot be honoured; only "
                f"{', '.join(self.family.activations)} can."
            )
        return self.family.activations[name]

    def _bias(self) -> Settings:
        if not self.family.biases:
            return {}
        names = [
            pair.partition("=")[0] for pair in next(iter(self.family.biases)).split()
        ]
        first = {
            name: text == "True"
            for name, _, text in (
                pair.partition("=") for pair in next(iter(self.family.biases)).split()
            )
        }
        values = [f"{name}={bool(self.get(name, first[name]))}" for name in names]
        said = " ".join(values)
        if said not in self.family.biases:
            raise InputError(
                f"{self.place}: {said} cannot be honoured; only "
                f"{' or '.join(self.family.biases)} can."
            )
        return {"bias": self.family.biases[said]}

    def _windows(self, num_layers: int) -> tuple[int, ...]:
        """Returns the window of every layer."""
        rule, listed = self.family.windows, self.get("layer_types")
        if rule == "chunks":
            return (0,) * num_layers
        if listed and (names := self.family.layer_names):
            listed = [names.get(kind, kind) for kind in listed]
        if rule == "never":
            if listed and set(listed) != {FULL}:
                unknown = sorted(set(listed) - {FULL})
                raise InputError(
                    f"{self.place}: layer_types has {', '.join(unknown)}, which cannot "
                    f"be honoured; only {FULL} can."
                )
            return (0,) * num_layers
        switched = self.get("use_sliding_window", rule != "upper_layers")
        explicit = "sliding_window" in self.config
        window = self.config.get("sliding_window") if explicit else None
        window = window if explicit else self.get("sliding_window")
        self._read |= {"sliding_window", "max_window_layers", "sliding_window_pattern"}
        if window is None or not (switched or listed):
            return (0,) * num_layers
        if listed:
            if len(listed) != num_layers or set(listed) - {FULL, SLIDING}:
                raise InputError(
                    f"{self.place}: layer_types has {len(listed)} entries, "
                    f"{sorted(set(listed))}; {num_layers} of {FULL} and {SLIDING} are "
                    "known."
                )
            return tuple(window if kind == SLIDING else 0 for kind in listed)
        if rule == "upper_layers":
            first = self.get("max_window_layers")
            return tuple(window if i >= first else 0 for i in range(num_layers))
        every = self.config.get("sliding_window_pattern") or self.family.full_every
        if rule == "always" or not every:
            return (window,) * num_layers
        return tuple(0 if (i + 1) % every == 0 else window for i in range(num_layers))

    def _check_layers(self, settings: Settings) -> None:
        """Refuses chunks in other layers than those with RoPE, or dense layers."""
        number = settings["num_layers"]
        rotates = settings["rope.layers"] * (number // len(settings["rope.layers"]))
        kind = CHUNKED if settings.get("variant.attention_chunk") else FULL
        wanted = {
            "layer_types": [kind if each else FULL for each in rotates],
            "moe_layers": list(range(number)),
        }
        for key, value in wanted.items():
            if self.get(key, value) != value:
                raise InputError(
                    f"{self.place}: {key}={self.config[key]} cannot be honoured; only "
                    f"{value} can."
                )

    def _rope(self, settings: Settings, windows: tuple[int, ...]) -> Settings:
        read: Settings = {"rope.layers": self._rotated(windows)}
        if self.family.rotated == "none":
            return read | {"rope.layers": (False,)}
        if self.family.rotated == "named":
            named = self.get("position_embedding_type") == "rope"
            read["rope.layers"] = (named,)
        full, local = self._rope_parameters()
        if "rotary_pct" in self.family.defaults:
            full.pop("rotary_pct", None)
        theta = full.pop("rope_theta")
        read["rope_theta"] = float(theta)
        if local is not None:
            kind = local.get("rope_type", "default")
            if kind != "default":
                raise InputError(
                    f"{self.place}: layers with a window have RoPE of type {kind}, "
                    "which cannot be honoured."
                )
            read["rope.window_theta"] = float(local["rope_theta"])
        dims = int(self._part(full, settings["head_dim"]) * settings["head_dim"])
        if dims != settings["head_dim"]:
            read["rope.dims"] = dims
        return read | self._scaling(full)

    def _part(self, rope: dict[str, Any], head_dim: int) -> float:
        """Returns the share of a head that is rotated."""
        key = "rotary_pct" if "rotary_pct" in self.family.defaults else PART
        part = rope.pop(PART, None)
        top = self.get(key, 1.0)
        if "rotary_dim" in self.family.defaults:
            rotated = self.get("rotary_dim")
            if rotated and self.config.get(PART) is None:
                top = rotated / head_dim
        part = top if part is None else part
        if part != 1 and key not in self.family.defaults:
            raise InputError(
                f"{self.place}: {PART}={part} is not honoured by "
                f"model_type={self.config['model_type']}; remove it."
            )
        self._read |= {"rotary_emb_base", PART}
        return part

    def _rotated(self, windows: tuple[int, ...]) -> tuple[bool, ...]:
        num_layers = len(windows)
        if self.family.rotated == "listed":
            listed = self.get("no_rope_layers")
            every = self.config.get("no_rope_layer_interval") or 4
            if not listed:
                listed = [int((i + 1) % every != 0) for i in range(num_layers)]
            if len(listed) != num_layers:
                raise InputError(
                    f"{self.place}: no_rope_layers has {len(listed)} entries for "
                    f"{num_layers} layers."
                )
            return shortest(tuple(bool(each) for each in listed))
        if self.family.rotated == "windows" and any(windows):
            return shortest(tuple(window > 0 for window in windows))
        return (True,)

    def _rope_parameters(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Returns those of layers without a window, and of those with one if apart.

        A scaling under the old key replaces the new one whole, its theta included.
        """
        for key in ("rope_parameters", "rope_scaling", "rope_theta"):
            self._read.add(key)
        old, new = self.config.get("rope_scaling"), self.config.get("rope_parameters")
        if new is None and "rope_scaling" not in self.config:
            new = self.family.defaults.get("rope_parameters")
        names = ("rope_theta", "rotary_emb_base")
        given = [self.config[name] for name in names if self.config.get(name)]
        theta = given[0] if given else self.family.defaults["rope_theta"]
        apart = bool(self.family.window_theta)
        local = self.get(self.family.window_theta, theta) if apart else theta
        if old is None and isinstance(new, dict) and (FULL in new or SLIDING in new):
            full = {"rope_theta": theta} | new.get(FULL, {})
            sliding = {"rope_theta": local} | new.get(SLIDING, {})
            return full, sliding
        parameters = {"rope_theta": theta} | dict(old if old is not None else new or {})
        return parameters, {"rope_theta": local} if apart else None

    def _scaling(self, given: dict[str, Any]) -> Settings:
        """Returns the settings of rope_parameters or rope_scaling, without theta."""
        given = dict(given)
        kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
        given.pop("type", None)
        if self.config["model_type"] == "phi3" and kind in ("su", "yarn"):
            kind = "longrope"
        if kind not in self.family.scalings:
            raise InputError(
                f"{self.place}: RoPE of type {kind!r} cannot be honoured; "
                f"{', '.join(self.family.scalings)} can."
            )
        read = SCALINGS[kind]
        length = self.get("max_position_embeddings")
        before = self.get("original_max_position_embeddings")
        growth = None
        if "variant.query_growth" in self.family.extras:
            growth = given.pop("llama_4_scaling_beta", None)
        settings = read(given, length, before)
        if growth is not None:
            settings |= {"variant.query_growth": growth}
        if given:
            raise InputError(
                f"{self.place}: {', '.join(sorted(given))} of RoPE of type {kind} is "
                "not known."
            )
        return settings


def load_json(path: Any) -> dict[str, Any]:
    """Returns a JSON object of a model's folder.

    Raises:
      InputError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object.")
    return content

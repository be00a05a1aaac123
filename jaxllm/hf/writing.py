# SPDX-License-Identifier: Apache-2.0
"""ModelConfig to config.json, by the table of a family."""

import math
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.errors import InputError
from jaxllm.hf.families import FAMILIES
from jaxllm.hf.flat import flatten
from jaxllm.hf.layers import shortest, write_sparse
from jaxllm.hf.rope import Settings, write_scaling
from jaxllm.hf.settings import CHUNKED, FULL, PART, SLIDING, read_model
from jaxllm.hf.table import Family

# Not part of a model but of how it is run or trained.
RUNNING = (
    *("dtype", "remat", "scan_layers", "moe.balance", "moe.balance_weight"),
    *("moe.router_z_loss", "moe.capacity_factor"),
)


def write_model(model_type: str, model: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model, for transformers 4 and 5.

    Raises:
      InputError: the family cannot say a setting of the model.
    """
    config = _write(FAMILIES[model_type], model_type, model)
    _, again = read_model(config, "config.json")
    if different := differences(model, again):
        raise InputError(
            f"model_type={model_type} cannot say {'; '.join(different)}; choose "
            "another, or change the model."
        )
    return config


def family_of(model: ModelConfig) -> str:
    """Returns the first model_type that can say all settings of a model.

    Raises:
      InputError: none can; names what the nearest one cannot say.
    """
    nearest: list[str] | None = None
    for model_type, family in FAMILIES.items():
        try:
            config = _write(family, model_type, model)
            different = differences(model, read_model(config, "config.json")[1])
        except InputError:
            continue
        if not different:
            return model_type
        if nearest is None or len(different) < len(nearest):
            nearest = different
    raise InputError(
        "no family of transformers has all settings of this model; the nearest one "
        f"lacks {'; '.join(nearest or ['all'])}."
    )


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Returns the settings in which two models differ, as text."""
    flat, again = (flatten(model) | _meant(model) for model in (one, other))
    return [
        f"config.model.{name}={flat[name]!r} (but {again[name]!r})"
        for name in flat
        if flat[name] != again[name] and name not in RUNNING
    ]


def _write(family: Family, model_type: str, model: ModelConfig) -> dict[str, Any]:
    """Returns the config.json that a family's table makes of a model."""
    flat = flatten(model)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        # Those of the class where they are absent, which may be beyond the vocabulary.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **family.constants,
    }
    for name, key in family.keys.items():
        value = flat[name]
        if name in ("moe.d_ff_expert", "moe.variant.d_ff_shared"):
            value = getattr(model, name.rpartition(".")[2])
        if name == "variant.attention_scale":
            value = model.head_dim**-0.5 if value is None else value
            if key == "query_pre_attn_scalar":
                value = value**-2
                value = round(value) if math.isclose(value, round(value)) else value
        config[key.removeprefix("1/")] = 1 / value if key.startswith("1/") else value
        if key in family.aliases:
            config[family.aliases[key]] = value
    names = [name for name, mlp in family.activations.items() if mlp == model.mlp]
    config[family.activation_key] = (names or [model.mlp])[0]
    for said, bias in family.biases.items():
        if bias == model.bias:
            for pair in said.split():
                key, _, text = pair.partition("=")
                config[key] = text == "True"
            break
    if model_type == "gpt_neox":
        config["use_parallel_residual"] = model.variant.parallel == "two_norms"
    config |= _write_windows(family, model) | _write_rope(family, model)
    return config | _write_experts(family, model)


def _write_experts(family: Family, model: ModelConfig) -> dict[str, Any]:
    """Returns which layers have experts, or the width of a model without any."""
    layers = map(model.layer, range(model.num_layers))
    config = write_sparse(family.sparse, tuple(layer.sparse for layer in layers))
    if family.dense_width and not model.moe.num_experts:
        config[family.dense_width] = model.d_ff
    return config


def _meant(model: ModelConfig) -> Settings:
    """Returns settings that can be written in several ways, in one of them."""
    layers = [model.layer(number) for number in range(model.num_layers)]
    return {
        "windows": shortest(tuple(layer.window for layer in layers)),
        "rope.layers": shortest(tuple(layer.rotates for layer in layers)),
        "moe.variant.layers": shortest(tuple(layer.sparse for layer in layers)),
        "moe.variant.first_dense": 0,
        "moe.d_ff_expert": model.d_ff_expert,
        "moe.variant.d_ff_shared": model.d_ff_shared,
        "moe.variant.choice_bias": model.moe.has_choice_bias,
    }


def _write_windows(family: Family, model: ModelConfig) -> dict[str, Any]:
    if family.windows == "never":
        if not family.layer_names:
            return {}
        old = {kind: name for name, kind in family.layer_names.items()}
        return {"layer_types": [old[FULL]] * model.num_layers}
    if family.windows == "chunks":
        rotates = model.rope.layers * (model.num_layers // len(model.rope.layers))
        chunk = model.variant.attention_chunk or None
        kind = CHUNKED if chunk else FULL
        types = [kind if each else FULL for each in rotates]
        return {"layer_types": types, "attention_chunk_size": chunk}
    repeats = model.num_layers // len(model.windows)
    windows = model.windows * repeats
    sizes = sorted({window for window in windows if window})
    config: dict[str, Any] = {"sliding_window": sizes[0] if sizes else None}
    if family.windows == "always":
        return config
    config["layer_types"] = [SLIDING if window else FULL for window in windows]
    if family.windows == "upper_layers":
        full = windows.count(0)
        config |= {"use_sliding_window": bool(sizes), "max_window_layers": full}
    if family.full_every:
        found = (i for i, window in enumerate(windows) if not window)
        config["sliding_window_pattern"] = next(found, family.full_every - 1) + 1
    return config


def _write_rope(family: Family, model: ModelConfig) -> dict[str, Any]:
    """Returns RoPE under the keys of transformers 5 and, beside them, of 4."""
    if family.rotated == "none":
        return {}
    rope, kind = model.rope, model.rope.scaling
    top: dict[str, Any] = {"rope_theta": model.rope_theta}
    scaling = write_scaling(rope)
    if growth := model.variant.query_growth:
        scaling["llama_4_scaling_beta"] = growth
    full = {"rope_theta": model.rope_theta, **scaling}
    full["rope_type"] = "default" if kind == "none" else kind
    part = _write_part(family, model)
    full |= {key: value for key, value in part.items() if key != "rotary_dim"}
    top |= part | _write_listed(family, model)
    top["rope_parameters"] = full
    if family.rotated == "named":
        rotates = all(layer.rotates for layer in model.period)
        top["position_embedding_type"] = "rope" if rotates else None
    if rope.window_theta is not None:
        sliding = {"rope_theta": rope.window_theta, "rope_type": "default"}
        top["rope_parameters"] = {FULL: full, SLIDING: sliding}
        top[family.window_theta or "rope_theta"] = rope.window_theta
    if "rotary_pct" in family.defaults:
        top["rotary_emb_base"] = model.rope_theta
    if kind == "longrope":
        # Version 4 takes these three keys and no other, and lengths from the top.
        top["rope_scaling"] = {"type": kind, **scaling}
        top["original_max_position_embeddings"] = rope.original_length
        top["max_position_embeddings"] = round(rope.factor * rope.original_length)
    elif kind == "none" and "rope_parameters" in family.defaults:
        top["rope_scaling"] = None  # absent, it would be that of the class
    elif kind != "none":
        # Where the old key is there, both versions take theta from beside it, or in it.
        top["rope_scaling"] = {"rope_type": kind, **scaling}
        if rope.window_theta is None:
            top["rope_scaling"]["rope_theta"] = model.rope_theta
    return top


def _write_part(family: Family, model: ModelConfig) -> dict[str, float]:
    """Returns the share of a head that is rotated, where a family has one."""
    part = (model.rope.dims or model.head_dim) / model.head_dim
    if "rotary_pct" in family.defaults:
        return {PART: part, "rotary_pct": part}
    if "rotary_dim" in family.defaults:
        return {PART: part, "rotary_dim": model.rope.dims or model.head_dim}
    return {PART: part} if PART in family.defaults else {}


def _write_listed(family: Family, model: ModelConfig) -> dict[str, list[int]]:
    """Returns which layers have RoPE, where a family lists them."""
    if family.rotated != "listed":
        return {}
    layers = model.rope.layers * (model.num_layers // len(model.rope.layers))
    return {"no_rope_layers": [int(each) for each in layers]}

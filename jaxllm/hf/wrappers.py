# SPDX-License-Identifier: Apache-2.0
"""Multimodal models whose text half is a family that can be read.

Source: transformers 5.24.0, the models' configurations and files.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.errors import InputError

# The text half's model_type, where text_config does not say one.
WRAPPERS: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "internvl": "qwen2",
    "llava": "llama",
    "mistral3": "mistral",
}
# Tensors of the other half, and of what joins the two.
OTHER_HALF = (
    r"(model\.)?(vision_tower|vision_model|audio_tower|multi_modal_projector)\..*"
)
# Said outside by some versions, and inside by others.
_SHARED = (
    *("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"),
    "quantization_config",
)

type Rename = Callable[[str], str]  # a name of the family's table to that in the files


def text_half(
    content: Mapping[str, Any], place: str, has_head: Callable[[], bool]
) -> dict[str, Any]:
    """Returns config.json of the text half, or all of a model without another half.

    Args:
      content: of config.json.
      place: of the file, for errors.
      has_head: whether the files have an output of their own, which says if it is tied
        where config.json does not: `tie_word_embeddings` inside is not looked at.

    Raises:
      InputError: it is multimodal and not in WRAPPERS.
    """
    inner, model_type = content.get("text_config"), content.get("model_type")
    if not isinstance(inner, dict):
        return dict(content)
    if not isinstance(model_type, str) or model_type not in WRAPPERS:
        raise InputError(
            f"{place}: model_type={model_type!r} is a multimodal model, whose text "
            f"half {inner.get('model_type')!r} cannot be read from it; that of "
            f"{', '.join(sorted(WRAPPERS))} can."
        )
    named = content.get("architectures") or []
    ends = ("ForConditionalGeneration", "Model")
    if not isinstance(named, list) or not all(str(x).endswith(ends) for x in named):
        raise InputError(
            f"{place}: architectures={named!r} is not of a language model; give the "
            "folder of one."
        )
    tied = content.get("tie_word_embeddings")
    half = {"model_type": WRAPPERS[model_type], **inner}
    half.pop("architectures", None)
    half["tie_word_embeddings"] = not has_head() if tied is None else tied
    for key in _SHARED:
        if half.get(key) is None and content.get(key) is not None:
            half[key] = content[key]
    return half


def names_inside() -> tuple[Rename, ...]:
    """Returns the ways in which files name tensors of a text half."""
    return (
        lambda name: f"language_model.{name}",
        lambda name: (
            f"model.language_model.{name.removeprefix('model.')}"
            if name.startswith("model.")
            else name
        ),
    )

# SPDX-License-Identifier: Apache-2.0
"""Makes wrappers.json and wrappers.npz: small multimodal models and their text logits.

In an environment with torch, transformers and numpy:

python tests/hf/make_wrappers.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from make_cases import LENGTH, WIDE, YARN
from transformers import (  # pyright: ignore[reportMissingImports]
    AutoConfig,
    AutoModelForImageTextToText,
)
from weights import draw

VISION = dict(
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
QUERIES_GROW = dict(YARN, llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0)
MISTRAL3 = dict(
    vision_config=dict(VISION, model_type="pixtral", head_dim=4),
    image_token_index=36,
    spatial_merge_size=1,
)
CASES = {
    "gemma3": dict(
        text_config=dict(
            WIDE,
            model_type="gemma3_text",
            num_hidden_layers=6,
            sliding_window=5,
            query_pre_attn_scalar=7,
        ),
        vision_config=dict(VISION, model_type="siglip_vision_model"),
        mm_tokens_per_image=4,
        image_token_index=36,
        boi_token_index=35,
        eoi_token_index=34,
    ),
    "mistral3": dict(
        MISTRAL3,
        text_config=dict(WIDE, model_type="ministral3", rope_parameters=QUERIES_GROW),
    ),
    "mistral3_mistral_untied": dict(
        MISTRAL3,
        text_config=dict(WIDE, model_type="mistral", sliding_window=5),
        tie_word_embeddings=False,
    ),
    "llava": dict(
        text_config=dict(WIDE, model_type="llama"),
        vision_config=dict(VISION, model_type="clip_vision_model", projection_dim=8),
        image_token_index=36,
    ),
    "internvl": dict(
        text_config={
            **{name: value for name, value in WIDE.items() if name != "head_dim"},
            "hidden_size": 24,
            "model_type": "qwen2",
        },
        vision_config=dict(
            VISION, model_type="internvl_vision", image_size=[8, 8], patch_size=[4, 4]
        ),
        image_token_id=36,
    ),
}


def make(case: str, settings: dict, folder: Path) -> tuple[dict, dict]:
    """Returns what the json and the npz file have of a case."""
    config = AutoConfig.for_model(case.partition("_")[0], **settings)
    model = AutoModelForImageTextToText.from_config(config)
    model.float().save_pretrained(folder)
    path = folder / "model.safetensors"
    shapes = {k: list(v.shape) for k, v in safetensors.torch.load_file(path).items()}
    drawn = {k: torch.from_numpy(draw(case, k, tuple(v))) for k, v in shapes.items()}
    safetensors.torch.save_file(drawn, path, metadata={"format": "pt"})
    model = AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager"
    )
    model = model.float().eval()
    ids = np.random.default_rng(0).integers(3, 34, (2, LENGTH))
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)).logits.float().numpy()
    content = json.loads((folder / "config.json").read_text())
    return (
        {"config": content, "shapes": shapes},
        {"ids": ids.astype(np.int32), "logits": logits},
    )


def main() -> None:
    facts, arrays = {"transformers": transformers.__version__, "cases": {}}, {}
    for case, settings in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            facts["cases"][case], found = make(case, settings, Path(folder))
        arrays |= {f"{case}/{name}": value for name, value in found.items()}
        print(case, f"{np.abs(found['logits']).max():.2f}", flush=True)
    folder = Path(__file__).parent
    text = json.dumps(facts, separators=(",", ":")) + "\n"
    (folder / "wrappers.json").write_text(text)
    np.savez_compressed(folder / "wrappers.npz", **arrays)


if __name__ == "__main__":
    main()

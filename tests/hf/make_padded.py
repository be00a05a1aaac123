# SPDX-License-Identifier: Apache-2.0
"""Makes padded.npz: transformers' logits of left-padded rows of models of cases.json.

In an environment with torch, transformers and numpy:

python tests/hf/make_padded.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
from weights import draw

HERE = Path(__file__).parent
CASES = ("gemma2", "gpt2", "ministral3", "olmo3", "qwen3", "smollm3")
LENGTHS = (24, 13, 5)  # tokens of the rows; the others are padding before them


def make(case: str, facts: dict, folder: Path) -> dict[str, np.ndarray]:
    """Returns ids, mask and logits of a case."""
    (folder / "config.json").write_text(json.dumps(facts["config"]))
    drawn = {
        name: torch.from_numpy(draw(case, name, tuple(shape)))
        for name, shape in facts["shapes"].items()
    }
    safetensors.torch.save_file(
        drawn, folder / "model.safetensors", metadata={"format": "pt"}
    )
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = np.random.default_rng(1).integers(3, 37, (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS)) >= max(LENGTHS) - np.array(LENGTHS)[:, None]
    ids = np.where(mask, ids, 0)
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        logits = model.float().eval()(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            position_ids=torch.from_numpy(positions),
        )
    return {
        "ids": ids.astype(np.int32),
        "mask": mask,
        "logits": logits.logits.float().numpy(),
    }


def main() -> None:
    known, arrays = json.loads((HERE / "cases.json").read_text())["cases"], {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            made = make(case, known[case], Path(folder))
        arrays |= {f"{case}/{name}": value for name, value in made.items()}
    np.savez_compressed(HERE / "padded.npz", **arrays)


if __name__ == "__main__":
    main()

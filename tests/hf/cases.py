# SPDX-License-Identifier: Apache-2.0
"""Small models of transformers, written as folders; see make_cases.py."""

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
PROMPTS = (5, 11)  # tokens of the two rows that greedy decoding continues


def _drawn() -> Callable[..., np.ndarray]:
    spec = importlib.util.spec_from_file_location("weights", HERE / "weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.draw


draw = _drawn()


@functools.cache
def all_cases() -> dict[str, dict[str, Any]]:
    """Returns config.json and the shapes of all tensors, by case."""
    files = sorted(HERE.glob("cases*.json"))
    return {n: c for f in files for n, c in json.loads(f.read_text())["cases"].items()}


def reference(case: str) -> dict[str, np.ndarray]:
    """Returns ids [2, 24], their logits, and greedy tokens [2, 40]; -1 is unknown."""
    for file in HERE.glob("cases*.npz"):
        with np.load(file) as arrays:
            if f"{case}/ids" in arrays:
                return {n: arrays[f"{case}/{n}"] for n in ("ids", "logits", "greedy")}
    raise KeyError(case)


def tensors(case: str) -> dict[str, np.ndarray]:
    """Returns the float32 tensors of a case."""
    shapes = all_cases()[case]["shapes"]
    return {name: draw(case, name, tuple(shape)) for name, shape in shapes.items()}


def write_folder(case: str, folder: Path) -> Path:
    """Writes a case as transformers saves it; returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(all_cases()[case]["config"]))
    save_file(tensors(case), folder / "model.safetensors", metadata={"format": "pt"})
    return folder

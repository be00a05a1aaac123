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
FILES = ("cases", "cases_mixtures", "cases_others")  # of make_cases.py
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
    return {case: facts for file in FILES for case, facts in _cases(file).items()}


@functools.cache
def _cases(file: str) -> dict[str, dict[str, Any]]:
    return json.loads((HERE / f"{file}.json").read_text())["cases"]


def reference(case: str) -> dict[str, np.ndarray]:
    """Returns ids [2, 24], their logits, and greedy tokens [2, 40]; -1 is unknown."""
    file = next(file for file in FILES if case in _cases(file))
    with np.load(HERE / f"{file}.npz") as arrays:
        return {n: arrays[f"{case}/{n}"] for n in ("ids", "logits", "greedy")}


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

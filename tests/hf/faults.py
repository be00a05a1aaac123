# SPDX-License-Identifier: Apache-2.0
"""Changes of a folder that make it a wrong one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hf.cases import tensors, write_folder
from safetensors.numpy import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

type Change = Callable[[Path], None]


def write_shards(case: str, folder: Path, dtype: type = np.float32) -> Path:
    """Writes a case in two files with an index."""
    write_folder(case, folder)
    (folder / WEIGHTS).unlink()
    found = tensors(case)
    names = sorted(found)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        arrays = {name: found[name].astype(dtype) for name in part}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def drop(name) -> Change:
    def change(folder: Path):
        arrays = load_file(folder / WEIGHTS)
        del arrays[name]
        save_file(arrays, folder / WEIGHTS)

    return change


def put(name, value) -> Change:
    def change(folder: Path):
        save_file({**load_file(folder / WEIGHTS), name: value}, folder / WEIGHTS)

    return change


def settings(**changes) -> Change:
    def change(folder: Path):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return change


def write(name, content) -> Change:
    def change(folder: Path):
        (folder / name).write_bytes(content)

    return change


def index_of(**weight_map) -> Change:
    def change(folder: Path):
        text = json.dumps({"weight_map": weight_map})
        (folder / INDEX).write_text(text)

    return change


def cut(folder: Path):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-10])


def only_pickle(folder: Path):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def two_files(folder: Path):
    (folder / "b.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    names = load_file(folder / WEIGHTS)
    first, *others = names
    index_of(**{first: "b.safetensors"}, **dict.fromkeys(others, WEIGHTS))(folder)


def only_pickle_shards(folder: Path):
    (folder / WEIGHTS).rename(folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def header(start: int, stop: int) -> bytes:
    """A file whose only tensor is where it cannot be."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [start, stop]}
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


def in_place_of(name: str) -> Change:
    """A folder has the name of a file."""

    def change(folder: Path):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def only(name: str) -> Change:
    """A folder has one file, and it is none of a model."""

    def change(folder: Path):
        for path in folder.iterdir():
            path.unlink()
        (folder / name).write_text("{}")

    return change

# SPDX-License-Identifier: Apache-2.0
"""A folder with a model of transformers: its settings and its files, checked."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
import safetensors

from jaxllm.config import ModelConfig
from jaxllm.errors import InputError
from jaxllm.hf.families import FAMILIES
from jaxllm.hf.quantized import (
    QUANTIZATION,
    STORED,
    decode,
    quantized_names,
    read_entry,
)
from jaxllm.hf.settings import load_json, read_model
from jaxllm.hf.table import Family
from jaxllm.hf.tensors import pieces
from jaxllm.hf.wrappers import OTHER_HALF, Rename, names_inside, text_half
from jaxllm.models import Model

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_STORED = DTYPES | STORED
_READABLE = {*DTYPES, "MXFP4", "FP8"}


class Folder:
    """The settings and the open files of a model.

    Attributes:
      path: of the folder.
      wrapper: the model_type of a multimodal model, of which this is the text half.
      model_type: its family.
      content: of config.json, or of the text half's part of it.
      config: its settings.
      names: of all tensors, with the file that each is in.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"{path} is not a folder with a model.")
        content, place = load_json(self.path / CONFIG), str(self.path / CONFIG)
        self.content = text_half(content, place, lambda: _has_head(self.path))
        self.wrapper = content["model_type"] if "text_config" in content else None
        self.model_type, self.config = read_model(self.content, place)
        self._stored = self.names = _find_files(self.path)
        self._quantized: dict[str, tuple[str, str]] = {}
        if quantization := self.content.get(QUANTIZATION):
            self._method = quantization["quant_method"]
            self._quantized = quantized_names(self._method, self.names)
            parts = {name for pair in self._quantized.values() for name in pair}
            self.names = {n: f for n, f in self.names.items() if n not in parts}
            for name, (values, _) in self._quantized.items():
                self.names[name] = self._stored[values]
        self._files: dict[str, tuple[dict[str, Any], np.ndarray]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self._files.clear()  # unmapped when the last view of them goes

    def describe(self) -> str:
        """Returns which model it is, and what of it is not read."""
        if self.wrapper is None:
            return self.model_type
        left = sum(bool(re.fullmatch(OTHER_HALF, name)) for name in self.names)
        return (
            f"{self.model_type}, the text half of {self.wrapper} ({left} tensors of "
            "the other half are left out)"
        )

    @property
    def family(self) -> Family:
        """The table of its family."""
        return FAMILIES[self.model_type]

    def entry(self, name: str) -> Mapping[str, Any]:
        """Returns shape and dtype of a tensor, such as F32, MXFP4 or FP8.

        Raises:
          InputError: it is quantized, and its parts do not fit.
        """
        if name not in self._quantized:
            return self._entry(name)
        parts = map(self._entry, self._quantized[name])
        return read_entry(self._method, f"{self.path}: {name}", *parts)

    def tensor(self, name: str, expert: int | None = None) -> np.ndarray:
        """Returns a tensor of the mapped file: what is used of it is read, no more.

        Args:
          name: of the tensor; a quantized one is float32, and in memory.
          expert: the only one that is wanted, of the first dimension.
        """
        if name not in self._quantized:
            return _part(self._map(name), expert)
        values, scales = map(self._map, self._quantized[name])
        return decode(self._method, _part(values, expert), _part(scales, expert))

    def _entry(self, name: str) -> Mapping[str, Any]:
        return self._open(self._stored[name])[0][name]

    def _map(self, name: str) -> np.ndarray:
        header, content = self._open(self._stored[name])
        start, stop = header[name]["data_offsets"]
        dtype = jnp.dtype(_STORED[header[name]["dtype"]])
        found = content[start:stop].view(dtype).reshape(header[name]["shape"])
        # Some writers do not align; a copy is, and JAX may need it.
        return found if found.flags.aligned else found.copy()

    def _open(self, file: str) -> tuple[dict[str, Any], np.ndarray]:
        """Returns the header of a file and the bytes behind it, which are mapped."""
        if file not in self._files:
            header, begin = read_header(self.path / file)
            content = np.asarray(np.memmap(self.path / file, np.uint8, "r"))
            self._files[file] = header, content[begin:]
        return self._files[file]


def _part(tensor: np.ndarray, expert: int | None) -> np.ndarray:
    return tensor if expert is None else tensor[expert]


def model_config(folder: str | Path, **changes: Any) -> ModelConfig:
    """Returns the settings of a model in a folder, for a config file of a run.

    Args:
      folder: of transformers; its weights are not read, but maybe their names.
      changes: settings to change, such as remat="full".

    Raises:
      InputError: its config.json has what cannot be honoured.
    """
    path, place = Path(folder), str(Path(folder) / CONFIG)
    content = text_half(load_json(path / CONFIG), place, lambda: _has_head(path))
    return dataclasses.replace(read_model(content, place)[1], **changes)


def check(folder: Folder) -> tuple[Model, Rename]:
    """Returns the model, and what gives the name of a tensor in the files.

    Raises:
      InputError: tensors are missing, surplus, or of another shape or dtype.
    """
    config, family = folder.config, folder.family
    rename = _prefix_rule(folder)
    config = _with_ties(folder, config, rename)
    model = Model(config)
    wanted: dict[str, tuple[int, ...]] = {}
    for path in model.letters:
        wanted |= {p.name: p.shape for p in pieces(model, family, path)}
    problems = []
    for name, shape in wanted.items():
        if rename(name) not in folder.names:
            problems.append(f"{rename(name)} is missing")
            continue
        entry = folder.entry(rename(name))
        if tuple(entry["shape"]) != shape:
            problems.append(
                f"{rename(name)} has the shape {entry['shape']}, where the settings "
                f"ask for {list(shape)}"
            )
        elif entry["dtype"] not in _READABLE:
            problems.append(f"{rename(name)} is {entry['dtype']}")
    known = {rename(name) for name in wanted}
    if config.tie_embeddings:
        known.add(rename(family.tensors["output"].name))
    number = str(config.num_layers)
    skipped = [pattern.replace("{L}", number) for pattern in family.skipped]
    skipped += [OTHER_HALF] if folder.wrapper else []
    for name in folder.names.keys() - known:
        if not any(re.fullmatch(pattern, name) for pattern in skipped):
            problems.append(f"{name} is not a parameter of this model")
    if problems:
        shown = "\n  ".join(sorted(problems)[:8] + ["..."] * (len(problems) > 8))
        raise InputError(
            f"{folder.path} does not have the tensors of its config.json, in "
            f"{len(problems)} cases:\n  {shown}"
        )
    return model, rename


def _with_ties(folder: Folder, config: ModelConfig, rename) -> ModelConfig:
    """Returns the settings with ties as the files have them.

    Raises:
      InputError: tied settings, and two tensors that differ.
    """
    names = [rename(folder.family.tensors[n].name) for n in ("output", "embedding")]
    if not config.tie_embeddings or any(name not in folder.names for name in names):
        return config
    output, embedding = (folder.tensor(name) for name in names)
    if not np.array_equal(output, embedding):
        raise InputError(
            f"{folder.path}: tie_word_embeddings=true, but {names[0]} is not "
            f"{names[1]}; set it to false to have both."
        )
    return config


def _prefix_rule(folder: Folder) -> Rename:
    """Returns how names of the table are written: a base model lacks the first word."""
    embedding = folder.family.tensors["embedding"].name
    prefix = embedding.partition(".")[0] + "."
    bare = embedding.removeprefix(prefix)
    if folder.wrapper:
        found = [rule for rule in names_inside() if rule(embedding) in folder.names]
        return found[0] if found else names_inside()[0]
    if bare in folder.names and embedding not in folder.names:
        return lambda name: name.removeprefix(prefix)
    return lambda name: name


def _has_head(path: Path) -> bool:
    """Returns whether the files have an output apart from the embedding."""
    return any(name.endswith("lm_head.weight") for name in _find_files(path))


def _find_files(path: Path) -> dict[str, str]:
    """Returns the file of each tensor."""
    index = path / INDEX
    if not index.exists():
        if not (path / WEIGHTS).exists():
            pickles = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt*"))
            hint = (
                f" {pickles[0].name} is a pickle, which runs code." if pickles else ""
            )
            raise InputError(f"{path} has no {WEIGHTS} and no {INDEX}.{hint}")
        return {name: WEIGHTS for name in _names_in(path / WEIGHTS)}
    names = load_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index} has no weight_map.")
    files = sorted(set(map(str, names.values())))
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{index}: {file!r} is not a file of this folder.")
    found: dict[str, str] = {}
    for file in files:
        for name in _names_in(path / file):
            if name in found:
                raise InputError(f"{path}: {found[name]} and {file} both have {name}.")
            found[name] = file
    if wrong := [name for name, file in names.items() if found.get(name) != file]:
        raise InputError(
            f"{index} says that {wrong[0]} is in {names[wrong[0]]}, and it is not."
        )
    return found


def _names_in(path: Path) -> list[str]:
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            names = list(file.keys())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}.") from error
    read_header(path)  # safetensors takes the last of two entries with one name
    return names


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header of a file that safetensors has checked, and where it ends."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        pairs = json.loads(file.read(size), object_pairs_hook=list)
    header = {name: dict(entry) for name, entry in pairs}
    if len(header) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in header if names.count(name) > 1)
        raise InputError(f"{path} has {twice} twice.")
    return header, 8 + size

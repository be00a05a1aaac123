# SPDX-License-Identifier: Apache-2.0
"""Writes a model as a folder of transformers, one tensor at a time."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.errors import InputError
from jaxllm.hf.carried import Carried
from jaxllm.hf.families import FAMILIES
from jaxllm.hf.folder import CONFIG, DTYPES, INDEX, WEIGHTS
from jaxllm.hf.tensors import Piece, pieces
from jaxllm.hf.writing import family_of, write_model
from jaxllm.models import Model

SHARD_BYTES = 5 * 10**9
_CODES = {name: code for code, name in DTYPES.items()}
_VERSION = "5.24.0"  # of transformers, whose layout this is

Layout = dict[str, dict[str, Any]]  # by file: the header of a safetensors file


def export(
    config: ModelConfig,
    params: Any,
    to: Path,
    *,
    carried: Carried,
    dtype: str | None = None,
) -> list[str]:
    """Writes config.json, safetensors files and what was carried along.

    Args:
      config: of the model.
      params: on the devices of this process.
      to: a folder that does not exist, or is empty.
      carried: what came with the model when it was imported.
      dtype: "float32", "bfloat16" or "float16", of all tensors; None: what each was
        when the model was imported, else float32.

    Returns:
      the names of the files.

    Raises:
      InputError: no family can say the settings; nothing is written then.
    """
    rows = carried.vocab_size
    written = config
    if rows and rows < config.vocab_size:
        written = _with_rows(config, rows)
    model_type = carried.model_type or family_of(written)
    content = write_model(model_type, written)
    content = content | carried.config if carried.config else content
    name = dtype or (carried.dtype if carried.layout else "float32")
    content |= {"dtype": name, "torch_dtype": name}
    content.setdefault("transformers_version", _VERSION)
    model = Model(written)
    layout = _layout(model, model_type, carried, dtype)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"--to={to} exists and is not empty; give a new folder.")
    partial = to.with_name(f"{to.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        carried.copy_to(partial)
        has_index = dtype is None and (partial / INDEX).exists()
        if not has_index:
            (partial / INDEX).unlink(missing_ok=True)
        _write_files(partial, model, model_type, params, layout, has_index)
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        if carried.config == content:
            text = carried.config_text
        (partial / CONFIG).write_text(text, encoding="utf-8")
        if to.exists():
            to.rmdir()  # empty
        partial.replace(to)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return sorted(path.name for path in to.iterdir())


def _with_rows(config: ModelConfig, rows: int) -> ModelConfig:
    return dataclasses.replace(config, vocab_size=rows)


def _layout(
    model: Model, model_type: str, carried: Carried, dtype: str | None
) -> Layout:
    """Returns the header of each file: as imported, or in the order of safetensors."""
    shapes = {
        piece.name: piece.shape
        for path in model.letters
        for piece in pieces(model, FAMILIES[model_type], path)
    }
    if carried.layout and dtype is None:
        return carried.layout
    code = _CODES[dtype or "float32"]
    width = jnp.dtype(DTYPES[code]).itemsize
    files: list[dict[str, Any]] = [{}]
    used = 0
    for name in sorted(shapes):
        size = int(np.prod(shapes[name])) * width
        if files[-1] and used + size > SHARD_BYTES:
            files.append({})
            used = 0
        offsets = [used, used + size]
        files[-1][name] = {
            "dtype": code,
            "shape": list(shapes[name]),
            "data_offsets": offsets,
        }
        used += size
    names = [WEIGHTS]
    if len(files) > 1:
        names = [
            f"model-{number:05d}-of-{len(files):05d}.safetensors"
            for number in range(1, len(files) + 1)
        ]
    headers = ({"__metadata__": {"format": "pt"}, **file} for file in files)
    return dict(zip(names, headers, strict=True))


def _write_files(
    folder: Path,
    model: Model,
    model_type: str,
    params: Any,
    layout: Layout,
    has_index: bool,
) -> None:
    by_name: dict[str, list[tuple[str, Piece]]] = {}
    for path in model.letters:
        for piece in pieces(model, FAMILIES[model_type], path):
            by_name.setdefault(piece.name, []).append((path, piece))
    total = 0
    for file, header in layout.items():
        with (folder / file).open("wb") as out:
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            out.write(len(text).to_bytes(8, "little") + text)
            for name, entry in _in_order(header):
                tensor = _tensor(by_name[name], params, entry)
                total += tensor.nbytes
                tensor.tofile(out)
            out.flush()
            os.fsync(out.fileno())
    if len(layout) > 1 and not has_index:
        names = {n: file for file, h in layout.items() for n, _ in _in_order(h)}
        index = {"metadata": {"total_size": total}, "weight_map": names}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def _in_order(header: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the tensors of a file in the order of their bytes."""
    tensors = ((n, entry) for n, entry in header.items() if n != "__metadata__")
    yield from sorted(tensors, key=lambda pair: pair[1]["data_offsets"])


def _tensor(parts: list[tuple[str, Piece]], params: Any, entry: Mapping) -> np.ndarray:
    out = np.empty(entry["shape"], jnp.dtype(DTYPES[entry["dtype"]]))
    for path, piece in parts:
        leaf = params
        for key in path.split("/"):
            leaf = leaf[key]
        part = np.asarray(_take(leaf, piece.place) if piece.place else leaf)
        sizes = [piece.sizes[letter] for letter in piece.letters]
        piece.into_file(part[tuple(slice(size) for size in sizes)], out)
    return out


@jax.jit
def _take(leaf: jax.Array, place: tuple[int, ...]) -> jax.Array:
    for index in place:
        leaf = jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False)
    return leaf

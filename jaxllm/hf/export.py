# SPDX-License-Identifier: Apache-2.0
"""Writes a model as a folder of transformers, one tensor at a time."""

import dataclasses
import functools
import hashlib
import json
import math
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
from jaxllm.hf.quantized import QUANTIZATION
from jaxllm.hf.settings import read_model
from jaxllm.hf.sums import write_sums
from jaxllm.hf.tensors import Piece, pieces
from jaxllm.hf.writing import differences, family_of, write_model
from jaxllm.models import Model

SHARD_BYTES = 5 * 10**9
METADATA = "__metadata__"
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
    length: int | None = None,
) -> list[str]:
    """Writes config.json, safetensors files and what was carried along.

    Args:
      config: of the model.
      params: on the devices of this process.
      to: a folder that does not exist, or is empty.
      carried: what came with the model when it was imported.
      dtype: "float32", "bfloat16" or "float16", of all tensors; None: what each was
        when the model was imported, else float32.
      length: tokens of the rows it was trained on, where config.json says none yet.

    Returns:
      the names of the files.

    Raises:
      InputError: no family can say the settings; nothing is written then.
    """
    rows = carried.vocab_size
    if rows and rows < config.vocab_size:  # more than in the folder, for a mesh
        config = dataclasses.replace(config, vocab_size=rows)
    model_type = carried.model_type or family_of(config)
    written = write_model(model_type, config)
    content = {**written, **carried.config}
    if FAMILIES[model_type].layer_names:
        content["layer_types"] = written[
            "layer_types"
        ]  # names that version 4 knows too
    content.pop(QUANTIZATION, None)  # tensors are written as plain ones
    _check_settings(content, config)
    layout = _layout(Model(config), model_type, carried, dtype)
    names = {entry["dtype"] for header in layout.values() for entry in _tensors(header)}
    if carried.config and dtype is None:
        content.setdefault("torch_dtype", carried.dtype)
        content.setdefault("dtype", carried.dtype)
    else:
        name = DTYPES[max(names)]
        content |= {"dtype": name, "torch_dtype": name}
    content.setdefault("transformers_version", _VERSION)
    if length is not None and "max_position_embeddings" not in content:
        content["max_position_embeddings"] = length
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"--to={to} exists and is not empty; give a new folder.")
    partial = to.with_name(f"{to.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        carried.copy_to(partial)
        sums = _write_files(partial, Model(config), model_type, params, layout)
        if layout is not carried.layout or not (partial / INDEX).exists():
            _write_index(partial, layout)
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        if carried.config == content:
            text = carried.config_text
        (partial / CONFIG).write_text(text, encoding="utf-8")
        write_sums(partial, sums)
        if to.exists():
            to.rmdir()  # empty
        partial.replace(to)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return sorted(path.name for path in to.iterdir())


def _check_settings(content: Mapping[str, Any], config: ModelConfig) -> None:
    """Refuses a config.json that was carried along and is not of this model."""
    _, said = read_model(content, CONFIG)
    if different := differences(config, said):
        raise InputError(
            f"the config.json that was imported says otherwise of "
            f"{'; '.join(different)}: the model was changed since."
        )


def _layout(
    model: Model, model_type: str, carried: Carried, dtype: str | None
) -> Layout:
    """Returns the header of each file: as imported if the tensors are the same."""
    shapes = {
        piece.name: piece.shape
        for path in model.letters
        for piece in pieces(model, FAMILIES[model_type], path)
    }
    known = {n: e for header in carried.layout.values() for n, e in header.items()}
    if dtype is None and known.keys() - {METADATA} == shapes.keys():
        return carried.layout
    # Others: buffers, a head beside its tie, or names of a base model. They go.
    prefix = FAMILIES[model_type].tensors["embedding"].name.partition(".")[0] + "."
    files: list[dict[str, Any]] = [{}]
    used = 0
    for name in sorted(shapes):
        imported = _imported(known, name) or _imported(known, name.removeprefix(prefix))
        code = _CODES[dtype] if dtype else imported or "F32"
        size = math.prod(shapes[name]) * jnp.dtype(DTYPES[code]).itemsize
        if files[-1] and used + size > SHARD_BYTES:
            files.append({})
            used = 0
        files[-1][name] = {
            "dtype": code,
            "shape": list(shapes[name]),
            "data_offsets": [used, used + size],
        }
        used += size
    number = len(files)
    headers = ({METADATA: {"format": "pt"}, **file} for file in files)
    if number == 1:
        return {WEIGHTS: next(headers)}
    return {
        f"model-{place:05d}-of-{number:05d}.safetensors": header
        for place, header in enumerate(headers, 1)
    }


def _imported(known: Mapping[str, Any], name: str) -> str | None:
    """Returns the dtype that a tensor was imported in; bfloat16 for fewer bits."""
    if f"{name}_blocks" in known or f"{name}_scale_inv" in known:
        return "BF16"
    return known.get(name, {}).get("dtype")


def _write_files(
    folder: Path, model: Model, model_type: str, params: Any, layout: Layout
) -> dict[str, str]:
    """Writes the tensors; returns the SHA-256 of each file."""
    sums = {}
    by_name: dict[str, list[tuple[str, Piece]]] = {}
    for path in model.letters:
        for piece in pieces(model, FAMILIES[model_type], path):
            by_name.setdefault(piece.name, []).append((path, piece))
    for file, header in layout.items():
        with (folder / file).open("wb") as out:
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            start = len(text).to_bytes(8, "little") + text
            out.write(start)
            digest = hashlib.sha256(start)
            in_order = sorted(_tensors(header), key=lambda entry: entry["data_offsets"])
            for entry in in_order:
                tensor = _tensor(by_name[entry["name"]], params, entry)
                tensor.tofile(out)
                digest.update(tensor.reshape(-1).view(np.uint8))
            out.flush()
            os.fsync(out.fileno())
        sums[file] = digest.hexdigest()
    return sums


def _write_index(folder: Path, layout: Layout) -> None:
    """Writes which file has which tensor, unless there is one file."""
    (folder / INDEX).unlink(missing_ok=True)
    if len(layout) == 1:
        return
    entries = [(file, e) for file, header in layout.items() for e in _tensors(header)]
    total = sum(e["data_offsets"][1] - e["data_offsets"][0] for _, e in entries)
    weight_map = {entry["name"]: file for file, entry in entries}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def _tensors(header: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the entries of a header, with their names."""
    for name, entry in header.items():
        if name != METADATA:
            yield {"name": name, **entry}


def _tensor(parts: list[tuple[str, Piece]], params: Any, entry: Mapping) -> np.ndarray:
    """Returns a tensor as a file has it, brought from the devices block by block."""
    out = np.empty(entry["shape"], jnp.dtype(DTYPES[entry["dtype"]]))
    for path, piece in parts:
        leaf = params
        for key in path.split("/"):
            leaf = leaf[key]
        view = piece.view(out if piece.expert is None else out[piece.expert])
        for block in piece.blocks(tuple((0, size) for size in view.shape)):
            starts = tuple(start for start, _ in block)
            sizes = tuple(stop - start for start, stop in block)
            part = np.asarray(_take(leaf, (*piece.place, *starts), sizes))
            view[tuple(slice(*each) for each in block)] = part
    return out


@functools.partial(jax.jit, static_argnums=2)
def _take(
    leaf: jax.Array, starts: tuple[int, ...], sizes: tuple[int, ...]
) -> jax.Array:
    """Returns a block of a parameter without its leading dimensions."""
    lead = (1,) * (leaf.ndim - len(sizes))
    return jax.lax.dynamic_slice(leaf, starts, lead + sizes).reshape(sizes)

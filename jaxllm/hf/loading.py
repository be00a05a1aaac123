# SPDX-License-Identifier: Apache-2.0
"""The parameters of a folder, read straight into the memory of the devices."""

import concurrent.futures
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.hf.folder import Folder, check
from jaxllm.hf.tensors import Bounds, Piece, pieces
from jaxllm.hf.wrappers import Rename
from jaxllm.models import Model

_THREADS = 4  # that read: parameters at a time, each by a block of a few MB


def load(folder: Path) -> tuple[ModelConfig, Any]:
    """Returns the settings and the float32 parameters of a model, on one device.

    Args:
      folder: of transformers: config.json and safetensors files.

    Raises:
      InputError: it is not whole, or has what cannot be honoured.
    """
    with Folder(folder) as opened:
        model, _ = check(opened)
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda leaf: leaf.update(sharding=place), model.abstract)
        return model.config, read_params(opened, target)


def read_params(folder: Folder, target: Any) -> Any:
    """Returns float32 parameters, placed as told; each process reads what it holds.

    Host memory is that of a few blocks of a tensor. Where the files and the devices
    order dimensions differently, blocks are transposed on their way.

    Args:
      folder: open.
      target: `jax.ShapeDtypeStruct` with a sharding for each parameter. Embedding and
        output may have more rows than the files: the others are zero.
    """
    model, rename = check(folder)
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(
            lambda pair: _read_parameter(folder, model, rename, *pair),
            [(_name(path), leaf) for path, leaf in leaves],
        )
        return structure.unflatten(found)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _read_parameter(
    folder: Folder, model: Model, rename: Rename, path: str, target: Any
) -> jax.Array:
    """Reads one parameter, piece by piece into the memory of each device."""
    shape, place = target.shape, target.sharding
    devices_by_bounds: dict[Bounds, list[Any]] = {}
    for device, index in place.addressable_devices_indices_map(shape).items():
        pairs = zip(index, shape, strict=True)
        bounds = tuple(part.indices(size)[:2] for part, size in pairs)
        devices_by_bounds.setdefault(bounds, []).append(device)
    buffers = {
        bounds: [_zeros(tuple(b - a for a, b in bounds), each) for each in devices]
        for bounds, devices in devices_by_bounds.items()
    }
    for piece in pieces(model, folder.family, path):
        held = [bounds for bounds in buffers if _holds(bounds, piece.place)]
        if not held:
            continue
        view = piece.view(folder.tensor(rename(piece.name), piece.expert))
        for bounds in held:
            buffers[bounds] = _write(buffers[bounds], bounds, piece, view)
    parts = [buffer for each in buffers.values() for buffer in each]
    return jax.make_array_from_single_device_arrays(shape, place, parts)


def _holds(bounds: Bounds, place: tuple[int, ...]) -> bool:
    """Returns whether leading indices are within bounds."""
    return all(
        start <= at < stop for at, (start, stop) in zip(place, bounds, strict=False)
    )


def _write(
    buffers: list[jax.Array], bounds: Bounds, piece: Piece, view: np.ndarray
) -> list[jax.Array]:
    """Returns the buffers of these bounds with the part of a piece that is in them."""
    lead = len(piece.place)
    inner = bounds[lead:]
    at = [p - b[0] for p, b in zip(piece.place, bounds, strict=False)]
    for block in piece.blocks(_within(inner, view.shape)):
        starts = [b[0] - i[0] for b, i in zip(block, inner, strict=True)]
        part = view[tuple(slice(*each) for each in block)]
        part = part.reshape((1,) * lead + part.shape)
        buffers = [
            _put(buffer, jax.device_put(part, buffer.device), (*at, *starts))
            for buffer in buffers
        ]
        jax.block_until_ready(buffers)  # else many blocks would be in memory
    return buffers


def _within(bounds: Bounds, shape: tuple[int, ...]) -> Bounds:
    """Returns the bounds as far as the file's rows go."""
    return tuple(
        (min(start, size), min(stop, size))
        for (start, stop), size in zip(bounds, shape, strict=True)
    )


def _zeros(size: tuple[int, ...], device: Any) -> jax.Array:
    """Returns zeros that are made on a device: jnp.zeros copies them to others."""
    with jax.default_device(device):
        return jnp.zeros(size, jnp.float32)


@functools.partial(jax.jit, donate_argnums=0)
def _put(buffer: jax.Array, block: jax.Array, starts: tuple[int, ...]) -> jax.Array:
    block = block.astype(buffer.dtype)
    return jax.lax.dynamic_update_slice(buffer, block, starts)

# SPDX-License-Identifier: Apache-2.0
"""The parameters of a folder, read straight into the memory of the devices."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.hf.folder import Folder, Rename, check
from jaxllm.hf.tensors import Piece, pieces
from jaxllm.models import Model

type Bounds = tuple[tuple[int, int], ...]  # start and stop along each dimension


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

    Host memory is that of one tensor of the files.

    Args:
      folder: open.
      target: `jax.ShapeDtypeStruct` with a sharding for each parameter. Embedding and
        output may have more rows than the files: the others are zero.
    """
    model, rename = check(folder)
    return jax.tree.map_with_path(
        lambda path, leaf: _read_parameter(folder, model, rename, _name(path), leaf),
        target,
    )


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
    parts = []
    for bounds, devices in devices_by_bounds.items():
        size = tuple(stop - start for start, stop in bounds)
        buffers = [jnp.zeros(size, jnp.float32, device=device) for device in devices]
        for piece in pieces(model, folder.family, path):
            lead = len(piece.place)
            at = [p - b[0] for p, b in zip(piece.place, bounds, strict=False)]
            if not all(0 <= a < n for a, n in zip(at, size, strict=False)):
                continue
            block = _read_piece(folder, piece, bounds[lead:], rename)
            block = block.reshape((1,) * lead + block.shape)
            starts = (*at, *(0 for _ in bounds[lead:]))
            buffers = [
                _put(buffer, jax.device_put(block, device), starts)
                for buffer, device in zip(buffers, devices, strict=True)
            ]
        parts += buffers
    return jax.make_array_from_single_device_arrays(shape, place, parts)


def _read_piece(
    folder: Folder, piece: Piece, bounds: Bounds, rename: Rename
) -> np.ndarray:
    """Returns the part of a piece within bounds, float32."""
    found = folder.entry(rename(piece.name))[piece.slices()]
    whole = piece.from_file(np.asarray(found))
    part = whole[tuple(slice(start, stop) for start, stop in bounds)]
    return np.ascontiguousarray(part, np.float32)


@functools.partial(jax.jit, donate_argnums=0)
def _put(buffer: jax.Array, block: jax.Array, starts: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, block, starts)

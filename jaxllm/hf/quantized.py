# SPDX-License-Identifier: Apache-2.0
"""Tensors that files have in fewer bits, with scales of blocks: read, never written.

Source: Open Compute Project, "OCP Microscaling Formats (MX) Specification" 1.0; files
of gpt-oss, DeepSeek-V3 and Qwen3-FP8 for transformers.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from jaxllm.errors import InputError

QUANTIZATION = "quantization_config"
PACKED = 32  # values of a block of mxfp4, two a byte
TILE = 128  # rows and columns of a block of fp8
# What JAX calls the dtypes of values and scales.
STORED = {"F8_E4M3": "float8_e4m3fn", "U8": "uint8"}
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_FP4, -_FP4])  # by the four bits


@dataclasses.dataclass(frozen=True)
class Method:
    """How a value of quant_method stores a tensor: in two.

    Attributes:
      values: what is behind the tensor's name.
      scales: the same, of the scales.
      dtypes: of values and of scales.
      shape: of the tensor, of the shapes of both; None: they do not fit.
      decode: of both, the tensor in float32.
    """

    values: str
    scales: str
    dtypes: tuple[tuple[str, ...], tuple[str, ...]]
    shape: Callable[[list[int], list[int]], list[int] | None]
    decode: Callable[[np.ndarray, np.ndarray], np.ndarray]


def quantized_names(method: str, names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Returns the tensors of a folder that are in two: their names by that of both."""
    how = METHODS[method]
    whole = [n.removesuffix(how.scales) for n in names if n.endswith(how.scales)]
    pairs = {name: (name + how.values, name + how.scales) for name in whole}
    return {name: pair for name, pair in pairs.items() if pair[0] in names}


def read_entry(
    method: str, name: str, values: Mapping[str, Any], scales: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns shape and dtype of a tensor, of the entries of its two parts.

    Args:
      method: of `METHODS`.
      name: of the tensor, for errors.
      values: shape and dtype.
      scales: the same.

    Raises:
      InputError: they are not those of the method.
    """
    how, parts = METHODS[method], (values, scales)
    shape = how.shape(values["shape"], scales["shape"])
    known = zip(parts, how.dtypes, strict=True)
    if shape is None or any(part["dtype"] not in dtypes for part, dtypes in known):
        raise InputError(
            f"{name}: values {values['dtype']} {values['shape']} and scales "
            f"{scales['dtype']} {scales['shape']} are not those of {method}."
        )
    return {"shape": shape, "dtype": method.upper()}


def decode(method: str, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns a tensor in float32, or one expert's part of it, of such parts."""
    return METHODS[method].decode(values, scales)


def without_quantization(
    config: Mapping[str, Any], known: tuple[str, ...], place: str
) -> Mapping[str, Any]:
    """Returns config.json without how tensors are stored, if they can be read.

    Args:
      config: its content.
      known: methods of the family.
      place: of the file, for errors.

    Raises:
      InputError: the method, or its blocks, cannot be read.
    """
    found = config.get(QUANTIZATION)
    if found is None:
        return config
    method = found.get("quant_method") if isinstance(found, dict) else None
    remedy = "give the folder of the model that was quantized."
    if method not in known:
        raise InputError(
            f"{place}: {QUANTIZATION}.quant_method={method!r} cannot be read for "
            f"model_type={config['model_type']}, only {' or '.join(known)}; {remedy}"
        )
    sizes = found.get("weight_block_size")
    if method == "fp8" and sizes != [TILE, TILE]:
        raise InputError(
            f"{place}: {QUANTIZATION}.weight_block_size={sizes} cannot be read, only "
            f"[{TILE}, {TILE}]; {remedy}"
        )
    return {key: value for key, value in config.items() if key != QUANTIZATION}


def _mxfp4_shape(values: list[int], scales: list[int]) -> list[int] | None:
    """Returns [experts, in, out]."""
    if len(values) != 4 or values[3] != PACKED // 2 or scales != values[:3]:
        return None
    experts, rows, blocks, _ = values
    return [experts, blocks * PACKED, rows]


def _decode_mxfp4(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns [..., in, out] of four-bit values, each 32 along `in` with an exponent.

    Args:
      values: uint8 [..., out, in / 32, 16], the even values in the low bits.
      scales: uint8 [..., out, in / 32], exponents plus 127; 255 is no number.
    """
    codes = np.stack([values & 15, values >> 4], -1)
    codes = codes.reshape(*scales.shape, PACKED)
    exponents = scales.astype(np.int32)
    factors = np.ldexp(np.float32(1), np.minimum(exponents, 254) - 127)
    factors = np.where(exponents == 255, np.float32(np.nan), factors)
    whole = (_E2M1[codes] * factors[..., None]).reshape(*scales.shape[:-1], -1)
    return whole.swapaxes(-1, -2)


def _fp8_shape(values: list[int], scales: list[int]) -> list[int] | None:
    tiles = [-(-size // TILE) for size in values[-2:]]
    return values if len(values) > 1 and scales == [*values[:-2], *tiles] else None


def _decode_fp8(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns values times the factor of their tile of 128 rows and columns.

    Args:
      values: float8_e4m3fn [..., out, in].
      scales: float32 [..., out / 128, in / 128], rounded up.
    """
    scales = scales.astype(np.float32)
    for axis in (-2, -1):
        of_each = np.arange(values.shape[axis]) // TILE
        scales = np.take(scales, of_each, axis=axis)
    return values.astype(np.float32) * scales


METHODS = {
    "mxfp4": Method(
        "_blocks", "_scales", (("U8",), ("U8",)), _mxfp4_shape, _decode_mxfp4
    ),
    "fp8": Method(
        "", "_scale_inv", (("F8_E4M3",), ("F32", "BF16")), _fp8_shape, _decode_fp8
    ),
}

# SPDX-License-Identifier: Apache-2.0
"""Reads the token files of other training stacks: nanoGPT, llm.c, Megatron-LM."""

import os
import struct

import numpy as np

from jaxllm.errors import InputError

# Source: llm.c, dev/data/data_common.py. The header is 256 int32; [2] counts tokens.
_LLMC_HEADER_BYTES = 1024
_LLMC_KINDS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: version, dtype
_LLMC_EVAL_MAGIC = 20240522

# Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
_MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, ends
_MEGATRON_DTYPES = {1: "u1", 4: "<i4", 8: "<u2"}


def open_foreign(path: str) -> tuple[str, np.ndarray, np.ndarray | None]:
    """Returns the format's name, the tokens, and the document ends if it has them.

    The format is detected by a neighbouring .idx file, then by the first bytes.
    """
    index = path.removesuffix(".bin") + ".idx"
    if os.path.exists(index):
        return "Megatron", *_open_megatron(path, index)
    start = _read_start(path, 12)
    size = os.path.getsize(path)
    magic, found, num_tokens = struct.unpack("<3i", start) if size >= 12 else (0, 0, 0)
    if magic == _LLMC_EVAL_MAGIC:
        raise InputError(
            f"{path} holds llm.c's multiple-choice questions, not a stream of tokens; "
            "name a file of tokens."
        )
    if magic not in _LLMC_KINDS:
        if size % 2:
            raise InputError(
                f"{path} has {size} bytes, but raw token files (nanoGPT) hold uint16 "
                "and have an even number; it is damaged, or of another format."
            )
        return "nanoGPT", map_file(path, np.dtype("<u2")), None
    version, dtype = _LLMC_KINDS[magic]
    if found != version:
        raise InputError(
            f"{path} has version {found} of the llm.c format {magic}, but only "
            f"version {version} is known; convert it."
        )
    expected = _LLMC_HEADER_BYTES + num_tokens * np.dtype(dtype).itemsize
    if num_tokens < 0 or size != expected:
        raise InputError(
            f"{path} has {size} bytes, but its header says {num_tokens} tokens, which "
            f"is {expected} bytes; it is damaged: copy it again."
        )
    return "llm.c", map_file(path, np.dtype(dtype), _LLMC_HEADER_BYTES), None


def _open_megatron(path: str, index: str) -> tuple[np.ndarray, np.ndarray]:
    header = _read_start(index, _MEGATRON_HEADER.size)
    if len(header) < _MEGATRON_HEADER.size or not header.startswith(_MEGATRON_MAGIC):
        raise InputError(
            f"{index} is not a Megatron index, because it does not start with "
            f"{_MEGATRON_MAGIC!r}; rename it if it does not belong to {path}."
        )
    _, version, code, num_sequences, num_ends = _MEGATRON_HEADER.unpack(header)
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise InputError(
            f"{index} has version {version} and token type {code}, but version 1 with "
            f"types {list(_MEGATRON_DTYPES)} (uint8, int32, uint16) can be read."
        )
    # int32 lengths, int64 byte offsets, int64 ends; multimodal sets add int8 modes
    size, expected = (
        os.path.getsize(index),
        len(header) + 12 * num_sequences + 8 * num_ends,
    )
    if size not in (expected, expected + num_sequences):
        raise InputError(
            f"{index} has {size} bytes, but its header needs {expected}; it is "
            "damaged: copy it again."
        )
    content = map_file(index, np.dtype("u1"))[len(header) : expected]
    lengths = content[: 4 * num_sequences].view("<i4")
    offsets = content[4 * num_sequences : 12 * num_sequences].view("<i8")
    sequence_ends = content[12 * num_sequences :].view("<i8")
    dtype = np.dtype(_MEGATRON_DTYPES[code])
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    in_order = np.array_equal(offsets, starts[:-1] * dtype.itemsize)
    fits = os.path.getsize(path) == starts[-1] * dtype.itemsize
    whole = num_ends and sequence_ends[0] == 0 and sequence_ends[-1] == num_sequences
    if not (in_order and fits and whole and np.all(np.diff(sequence_ends) >= 0)):
        raise InputError(
            f"{path} ({os.path.getsize(path)} bytes) is not what {index} describes "
            f"({starts[-1]} tokens in {num_sequences} sequences, in order); one of "
            "them is damaged, or they do not belong together: copy both again."
        )
    return map_file(path, dtype), np.unique(starts[sequence_ends[1:]])


def map_file(path: str, dtype: np.dtype, offset: int = 0) -> np.ndarray:
    """Maps a file of numbers into memory, read-only."""
    try:
        if os.path.getsize(path) <= offset:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        return np.memmap(path, dtype, "r", offset)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _read_start(path: str, num_bytes: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(num_bytes)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error

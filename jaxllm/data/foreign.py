# SPDX-License-Identifier: Apache-2.0
"""Reads the token files of other training stacks: nanoGPT, llm.c, Megatron-LM."""

import dataclasses
import os
import struct

import numpy as np

from jaxllm.config.sections import RawDtype
from jaxllm.data.sample import looks_like_uint32
from jaxllm.data.token_file import TokenFile, read_numbers, read_start
from jaxllm.errors import InputError

# Source: llm.c, dev/data/data_common.py. The header is 256 int32; [2] counts tokens.
_LLMC_HEADER_BYTES = 1024
_LLMC_KINDS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: version, dtype
_LLMC_EVAL_MAGIC = 20240522

# Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
_MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, ends
_MEGATRON_DTYPES = {1: "u1", 4: "<i4", 8: "<u2"}


@dataclasses.dataclass(frozen=True)
class ForeignFile:
    """A token file of another stack."""

    kind: str  # the name of its format
    tokens: TokenFile
    ends: np.ndarray | None = None  # exclusive ends of documents, if it lists them
    usual: "UsualEnd | None" = None  # of its format, if it does not


@dataclasses.dataclass(frozen=True)
class UsualEnd:
    """The token that a tokenizer puts between documents."""

    token: int
    vocab_size: int  # of that tokenizer: a larger id is of another one


# nanoGPT and llm.c write GPT-2's <|endoftext|>, the latter also Llama 3's
# <|begin_of_text|>, each between two documents: after one or before the next is the
# same stream.
_USUAL = {
    np.dtype("<u2"): UsualEnd(50256, 50257),
    np.dtype("<u4"): UsualEnd(128000, 128256),
}


def open_foreign(path: str, raw_dtype: RawDtype) -> ForeignFile:
    """Opens a file; its format is detected by a neighbouring .idx, then by its start.

    Args:
      path: of the .bin file.
      raw_dtype: of a file without a header; "auto" is uint16, as in nanoGPT.
    """
    index = path.removesuffix(".bin") + ".idx"
    if os.path.exists(index):
        return _open_megatron(path, index)
    start = read_start(path, 12)
    size = os.path.getsize(path)
    magic, found, num_tokens = struct.unpack("<3i", start) if size >= 12 else (0, 0, 0)
    if magic == _LLMC_EVAL_MAGIC:
        raise InputError(
            f"{path} holds llm.c's multiple-choice questions, not a stream of tokens; "
            "name a file of tokens."
        )
    if magic not in _LLMC_KINDS:
        return _open_raw(path, size, raw_dtype)
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
    tokens = TokenFile(path, np.dtype(dtype), _LLMC_HEADER_BYTES)
    return ForeignFile("llm.c", tokens, usual=_USUAL[tokens.dtype])


def _open_raw(path: str, size: int, raw_dtype: RawDtype) -> ForeignFile:
    dtype = np.dtype("<u4" if raw_dtype == "uint32" else "<u2")
    if size % dtype.itemsize:
        raise InputError(
            f"{path} has {size} bytes, but raw token files (nanoGPT) hold "
            f"{dtype.name}, {dtype.itemsize} bytes each; it is damaged, or of another "
            "format."
        )
    tokens = TokenFile(path, dtype)
    if raw_dtype == "auto" and looks_like_uint32(
        len(tokens), lambda start, stop: tokens[start:stop]
    ):
        raise InputError(
            f"{path} is read as uint16, as nanoGPT writes it, but every second number "
            "of it is below 16, as in a file of uint32; set "
            "config.data.raw_dtype=uint32, or config.data.raw_dtype=uint16 if it is "
            "uint16."
        )
    usual = None if raw_dtype == "uint32" else _USUAL[dtype]
    return ForeignFile(f"raw {dtype.name}", tokens, usual=usual)


def _open_megatron(path: str, index: str) -> ForeignFile:
    header = read_start(index, _MEGATRON_HEADER.size)
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
    content = read_numbers(index, np.dtype("u1"))[len(header) : expected]
    lengths = content[: 4 * num_sequences].view("<i4")
    offsets = content[4 * num_sequences : 12 * num_sequences].view("<i8")
    sequence_ends = content[12 * num_sequences :].view("<i8")
    tokens = TokenFile(path, np.dtype(_MEGATRON_DTYPES[code]))
    starts = np.zeros(num_sequences + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    in_order = np.array_equal(offsets, starts[:-1] * tokens.dtype.itemsize)
    fits = os.path.getsize(path) == starts[-1] * tokens.dtype.itemsize
    whole = num_ends and sequence_ends[0] == 0 and sequence_ends[-1] == num_sequences
    ordered = (sequence_ends[1:] >= sequence_ends[:-1]).all()
    if not (in_order and fits and whole and ordered and lengths.min(initial=0) >= 0):
        raise InputError(
            f"{path} ({os.path.getsize(path)} bytes) is not what {index} describes "
            f"({starts[-1]} tokens in {num_sequences} sequences, in order); one of "
            "them is damaged, or they do not belong together: copy both again."
        )
    return ForeignFile("Megatron", tokens, starts[sequence_ends[1:]])

# SPDX-License-Identifier: Apache-2.0
"""Writes token files: shards of equal size, document boundaries, held-out split."""

import bisect
import os
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from jaxllm.data.manifest import ENDS_DTYPE, SplitEntry, describe_split
from jaxllm.errors import InputError
from jaxllm.text.encoding import Encoded

_BLOCK_TOKENS = 2**22
_MAX_SHARDS = 100_000  # whose names have five digits


class SplitWriter:
    """Writes the tokens of one split into shards of equal size, except the last."""

    def __init__(self, folder: str, split: str, *, dtype: str, shard_tokens: int):
        self.shards: list[str] = []
        self.ends_name = f"{split}-ends.bin"
        self.num_tokens = 0
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._shard: BinaryIO | None = None
        self._ends: BinaryIO | None = open(os.path.join(folder, self.ends_name), "wb")

    def write(self, tokens: np.ndarray, ends: np.ndarray):
        """Appends tokens, and the document ends (exclusive) within them."""
        assert self._ends is not None, "the writer is closed"
        self._ends.write((ends + self.num_tokens).astype(ENDS_DTYPE).tobytes())
        done = 0
        while done < len(tokens):
            room = self._shard_tokens - self.num_tokens % self._shard_tokens
            part = tokens[done : done + room]
            self._open_shard().write(part.astype(self._dtype, copy=False).tobytes())
            done += len(part)
            self.num_tokens += len(part)
            if len(part) == room:
                self._shard = _close(self._shard)

    def close(self):
        """Flushes all files to the disk."""
        self._shard = _close(self._shard)
        self._ends = _close(self._ends)

    def _open_shard(self) -> BinaryIO:
        if self._shard is None:
            if len(self.shards) == _MAX_SHARDS:
                raise InputError(
                    f"--shard_tokens={self._shard_tokens} makes more than "
                    f"{_MAX_SHARDS} files; give more tokens a file, such as 100000000."
                )
            self.shards.append(f"{self._split}-{len(self.shards):05d}.bin")
            self._shard = open(os.path.join(self._folder, self.shards[-1]), "wb")
        return self._shard


def write_splits(
    folder: str,
    encoded: Iterable[Encoded],
    *,
    holdout: float,
    holdout_by: str,
    has_ends: bool,
    dtype: str,
    shard_tokens: int,
) -> dict[str, SplitEntry]:
    """Writes tokens into their splits and returns the entries of the manifest.

    Args:
      holdout: the share of documents or, by "tail", of tokens that goes into eval.
      has_ends: each document ends with an end-of-document token, not part of its text.
    """
    train, held_out = (
        SplitWriter(folder, split, dtype=dtype, shard_tokens=shard_tokens)
        for split in ("train", "eval")
    )
    by_document = holdout if holdout_by == "document" else 0.0
    try:
        for tokens, ends, is_eval in _assign(encoded, by_document):
            (held_out if is_eval else train).write(tokens, ends)
        train.close()
        if holdout_by == "tail":
            _move_tail(folder, train, held_out, holdout, has_ends, dtype)
    finally:
        train.close()
        held_out.close()
    return {
        split: describe_split(folder, dtype, writer.shards, writer.ends_name)
        for split, writer in dict(train=train, eval=held_out).items()
        if writer.num_tokens
    }


def is_held_out(document_hash: int, holdout: float) -> bool:
    """Returns whether a document is held out; equal documents are on the same side."""
    return document_hash < holdout * 2**64


def _assign(
    encoded: Iterable[Encoded], holdout: float
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yields runs of tokens of one split, with the ends of documents within them."""
    is_eval = False
    for pieces, tokens, lengths, _ in encoded:
        sides = np.empty(len(pieces), bool)
        for i, piece in enumerate(pieces):
            if piece.is_first:
                is_eval = is_held_out(piece.document_hash, holdout)
            sides[i] = is_eval
        is_last = np.array([piece.is_last for piece in pieces])
        for side in (False, True):
            chosen = sides == side
            if chosen.any():
                ends = np.cumsum(lengths[chosen])[is_last[chosen]]
                yield tokens[np.repeat(chosen, lengths)], ends, side


def _move_tail(
    folder: str,
    train: SplitWriter,
    held_out: SplitWriter,
    holdout: float,
    has_ends: bool,
    dtype: str,
):
    """Moves the last part of train into eval, as `_tail_start` says."""
    ends = np.fromfile(os.path.join(folder, train.ends_name), ENDS_DTYPE)
    at = _tail_start(ends, train.num_tokens, holdout, has_ends)
    if at == train.num_tokens:
        return
    start, kept = 0, []
    for name in train.shards:
        path = os.path.join(folder, name)
        stop = start + os.path.getsize(path) // np.dtype(dtype).itemsize
        _copy_tokens(path, max(at - start, 0), start, ends, dtype, held_out)
        if start < at:
            _truncate(path, (min(at, stop) - start) * np.dtype(dtype).itemsize)
            kept.append(name)
        else:
            os.unlink(path)
        start = stop
    num_before = int(np.searchsorted(ends, at))  # a document may be split in two
    _truncate(os.path.join(folder, train.ends_name), num_before * ends.itemsize)
    with open(os.path.join(folder, train.ends_name), "ab") as file:
        file.write(np.array([at] if at else [], ENDS_DTYPE).tobytes())
    train.shards, train.num_tokens = kept, at


def _copy_tokens(
    path: str, skip: int, start: int, ends: np.ndarray, dtype: str, writer: SplitWriter
):
    """Copies a shard but for its first tokens; `start` is its place in the split."""
    itemsize = np.dtype(dtype).itemsize
    while True:
        block = np.fromfile(path, dtype, _BLOCK_TOKENS, offset=skip * itemsize)
        if not len(block):
            return
        first = start + skip
        low, high = np.searchsorted(ends, [first, first + len(block)], side="right")
        writer.write(block, ends[low:high] - first)
        skip += len(block)


def _truncate(path: str, num_bytes: int):
    with open(path, "r+b") as file:
        file.truncate(num_bytes)
        os.fsync(file.fileno())


def _tail_start(ends: np.ndarray, total: int, holdout: float, has_ends: bool) -> int:
    """Returns the first held-out token.

    Of n tokens of text it is int(n * (1 - holdout)), as in nanoGPT; ends of documents
    do not count.
    """
    extra = int(has_ends)
    kept = int((total - extra * len(ends)) * (1 - holdout))
    before = bisect.bisect_right(
        range(len(ends)), kept, key=lambda i: int(ends[i]) - extra * (i + 1)
    )
    return kept + extra * before


def _close(file: BinaryIO | None) -> None:
    if file is not None:
        file.flush()
        os.fsync(file.fileno())
        file.close()

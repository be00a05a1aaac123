# SPDX-License-Identifier: Apache-2.0
"""Tokenizes a stream of text on all cores, in the order of the text."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxllm.data.manifest import token_dtype
from jaxllm.text.borders import make_cutter
from jaxllm.text.documents import Piece
from jaxllm.text.lost_characters import Lost, encode_and_count
from jaxllm.text.tokenizers import BytesTokenizer, HFTokenizer, Tokenizer

CHUNK_BYTES = 2**20  # bytes of text sent to a worker at once
CHUNK_PIECES = 4096  # bounds the memory of many short documents


class Encoded(NamedTuple):
    """Consecutive pieces with their tokens."""

    pieces: list[Piece]
    tokens: np.ndarray  # of all pieces, concatenated
    lengths: np.ndarray  # tokens of each piece
    lost: Lost  # characters that they do not hold


def encode_pieces(
    pieces: Iterable[Piece], tokenizer: Tokenizer, *, append_end: bool, workers: int
) -> Generator[Encoded]:
    """Yields the tokens of pieces; memory does not grow with the length of the stream.

    Args:
      append_end: append the end-of-document token to each document.
      workers: number of processes; the result does not depend on it.
    """
    chunks = _chunk(pieces)
    if workers > 1:
        yield from _encode_by_workers(chunks, tokenizer, append_end, workers)
        return
    for chunk in chunks:
        yield Encoded(chunk, *_encode(chunk, tokenizer, append_end))


def _chunk(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    chunk, num_bytes = [], 0
    for piece in pieces:
        chunk.append(piece)
        num_bytes += len(piece.text)
        if num_bytes >= CHUNK_BYTES or len(chunk) == CHUNK_PIECES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _encode(
    chunk: list[Piece], tokenizer: Tokenizer, append_end: bool
) -> tuple[np.ndarray, np.ndarray, Lost]:
    dtype = token_dtype(tokenizer.vocab_size)
    lost = Lost()
    if isinstance(tokenizer, BytesTokenizer):
        arrays = [np.frombuffer(piece.text, np.uint8).astype(dtype) for piece in chunk]
    else:
        arrays = [np.empty(0, dtype)] * len(chunk)
        for is_first in {piece.is_first for piece in chunk}:
            some = [i for i, piece in enumerate(chunk) if piece.is_first == is_first]
            of_these = tokenizer if is_first else make_cutter(tokenizer).continuation
            assert isinstance(of_these, HFTokenizer)
            texts = [chunk[i].text.decode() for i in some]
            batch, lost_here = encode_and_count(of_these, texts)
            lost.add(lost_here)
            for i, ids in zip(some, batch, strict=True):
                arrays[i] = np.array(ids, dtype)
    if append_end:
        end = np.array([tokenizer.end_of_document], dtype)
        arrays = [
            np.concatenate([array, end]) if piece.is_last else array
            for piece, array in zip(chunk, arrays, strict=True)
        ]
    lengths = np.array([len(array) for array in arrays], np.int64)
    return np.concatenate(arrays), lengths, lost


def _encode_by_workers(
    chunks: Iterator[list[Piece]], tokenizer: Tokenizer, append_end: bool, workers: int
) -> Iterator[Encoded]:
    executor = concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, append_end),
    )
    pending = collections.deque()
    try:
        for chunk in chunks:
            with _signals_held_back():
                pending.append((chunk, executor.submit(_encode_in_worker, chunk)))
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield Encoded(done, *future.result())
        while pending:
            done, future = pending.popleft()
            yield Encoded(done, *future.result())
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_held_back():
    # `submit` may start a worker, which inherits this: Ctrl-C is for the parent alone.
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


_worker_settings: tuple[Tokenizer, bool]  # set in each worker, once


def _start_worker(tokenizer: Tokenizer, append_end: bool):
    global _worker_settings
    _worker_settings = (tokenizer, append_end)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent():
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(chunk: list[Piece]) -> tuple[np.ndarray, np.ndarray, Lost]:
    return _encode(chunk, *_worker_settings)

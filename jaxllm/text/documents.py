# SPDX-License-Identifier: Apache-2.0
"""Reads all text sources as one stream of documents, in pieces that fit in memory."""

import codecs
import collections
import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from jaxllm.errors import InputError
from jaxllm.text.rows import (
    InvalidRowError,
    Row,
    looks_like_json,
    read_json,
    read_parquet,
    text_of,
)
from jaxllm.text.sources import STDIN, Source
from jaxllm.text.streams import explained, open_source

PIECE_BYTES = 2**20  # documents up to this size are one piece
_LARGE_BYTES = 2**26  # said of a piece that cannot be cut
_ENCODING_BYTES = 150  # memory a byte of one piece, as measured


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: bytes  # valid UTF-8, never empty
    is_first: bool  # of its document
    is_last: bool
    document_hash: int  # below 2**64, of the document's first PIECE_BYTES
    source_bytes: int = 0  # read from the input for it


class Reading(NamedTuple):
    """How documents are read."""

    text_field: str
    skip_invalid_rows: bool
    skipped: collections.Counter  # documents left out, by reason
    # Takes a text that continues, and returns where it may be cut after a place.
    cut: Callable[[bytearray, int], int | None]


def read_pieces(sources: Sequence[Source], reading: Reading) -> Iterator[Piece]:
    """Yields the documents of sources in order, split into pieces.

    A text file is one document, as is a line of .jsonl, an element of a .json array or
    a row of .parquet.
    """
    for source in sources:
        with explained(source):
            if source.kind == "parquet":
                rows = read_parquet(source, reading.text_field)
                yield from _read_rows(rows, reading)
            else:
                yield from _read_stream(source, reading)


def _read_stream(source: Source, reading: Reading) -> Iterator[Piece]:
    with open_source(source) as opened:
        if source.kind == "text":
            pieces = _read_text(source, opened.stream, reading)
        else:
            pieces = _read_rows(read_json(source, opened), reading)
        done = 0
        for piece in pieces:
            at = opened.position() if opened.position else done + len(piece.text)
            yield piece._replace(source_bytes=at - done)
            done = at


def _read_rows(rows: Iterator[Row], reading: Reading) -> Iterator[Piece]:
    for row in rows:
        try:
            text = text_of(row, reading.text_field)
        except InvalidRowError as error:
            if not reading.skip_invalid_rows:
                raise
            reading.skipped[error.reason] += 1
            continue
        for piece in _cut(b"", io.BytesIO(text).read, reading):
            source_bytes = row.source_bytes if piece.is_last else 0
            yield piece._replace(source_bytes=source_bytes)


def _read_text(source: Source, stream: BinaryIO, reading: Reading) -> Iterator[Piece]:
    if source.skip_undecodable:
        content = stream.read()
        if not _is_utf8(content):
            reading.skipped["undecodable"] += 1
            return
        stream = io.BytesIO(content)
    read = _Utf8(source, stream).read
    # The mark of an encoding is not text.
    head = read(PIECE_BYTES).removeprefix(codecs.BOM_UTF8)
    if not source.skip_undecodable:
        _refuse_json(source, head, reading.text_field)
    yield from _cut(head, read, reading)


def _refuse_json(source: Source, head: bytes, text_field: str):
    kind = looks_like_json(head, text_field)
    if not kind:
        return
    if source.path != STDIN:
        remedy = f"name it {'.json' if kind == 'array' else '.jsonl'}"
    elif kind == "lines":
        remedy = "give --stdin_format=jsonl"
    else:
        remedy = "write it to a .json file and give that"
    raise InputError(
        f"--input={source.path} is read as text, but begins like JSON with the field "
        f"{text_field!r}; to read that field, {remedy}. To tokenize the JSON itself, "
        "give a --text_field that it does not have."
    )


def _cut(
    head: bytes, read: Callable[[int], bytes], reading: Reading
) -> Iterator[Piece]:
    """Yields one document, of which head is read, in pieces of about PIECE_BYTES."""
    rest = bytearray(head or read(PIECE_BYTES))
    if not rest:
        reading.skipped["empty"] += 1
        return
    digest = hashlib.blake2b(rest[:PIECE_BYTES], digest_size=8).digest()
    number, is_first, searched = int.from_bytes(digest), True, 0
    while following := read(PIECE_BYTES):
        if at := reading.cut(rest, searched):
            yield Piece(bytes(rest[:at]), is_first, False, number)
            del rest[:at]
            is_first = False
        elif len(rest) // _LARGE_BYTES > (len(rest) - PIECE_BYTES) // _LARGE_BYTES:
            print(
                f"note: a document of more than {len(rest) >> 20} MiB is tokenized as "
                "a whole: it has no place where this tokenizer allows a cut. It takes "
                f"about {len(rest) * _ENCODING_BYTES >> 30} GiB of memory.",
                file=sys.stderr,
            )
        searched = len(rest)
        rest += following
    yield Piece(bytes(rest), is_first, True, number)


class _Utf8:
    """Reads a text, and refuses what is not UTF-8 where it is."""

    def __init__(self, source: Source, stream: BinaryIO):
        self._source, self._stream = source, stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._done = 0

    def read(self, num_bytes: int) -> bytes:
        block = self._stream.read(num_bytes)
        start = self._done - len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise InputError(
                f"--input={self._source.path} is not UTF-8 text: byte "
                f"{start + error.start} is {error.object[error.start]:#04x}; convert "
                "it, as in `iconv -f latin1 -t utf-8 OLD > NEW`, or leave it out (a "
                "glob such as 'folder/**/*.txt' takes the texts of a folder)."
            ) from error
        self._done += len(block)
        return block


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True

# SPDX-License-Identifier: Apache-2.0
"""Reads all text sources as one stream of documents, in pieces that fit in memory."""

import collections
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from jaxllm.errors import InputError
from jaxllm.text.sources import STDIN, Source

PIECE_BYTES = 2**20  # documents up to this size are one piece

# GPT-2's pre-tokenization never joins text across these borders, so splitting a long
# document there, after a line or else before a word, does not change its tokens.
_BORDERS = (re.compile(rb"\S\n(?=\S)"), re.compile(rb"\S(?= \S)"))
_BORDER_BYTES = 2**16  # bytes at the end of a piece that are searched for a border


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: bytes  # valid UTF-8, never empty
    is_first: bool  # of its document
    is_last: bool
    source_bytes: int  # read from the input for it


def read_pieces(
    sources: Sequence[Source], *, text_field: str, skipped: collections.Counter
) -> Iterator[Piece]:
    """Yields the documents of sources in order, split into pieces.

    A text file is one document, as is a line of .jsonl or a row of .parquet. Skipped
    documents are counted in `skipped`, as "empty" or "undecodable".
    """
    for source in sources:
        try:
            if source.kind == "text":
                yield from _read_text(source, skipped)
            elif source.kind == "jsonl":
                yield from _read_jsonl(source, text_field, skipped)
            else:
                yield from _read_parquet(source, text_field, skipped)
        except OSError as error:
            raise InputError(
                f"--input={source.path} cannot be read: {error.strerror or error}; "
                "make it readable or leave it out."
            ) from error


def _open(source: Source) -> contextlib.AbstractContextManager[BinaryIO]:
    if source.path == STDIN:
        return contextlib.nullcontext(sys.stdin.buffer)
    return open(source.path, "rb")


def _read_text(source: Source, skipped: collections.Counter) -> Iterator[Piece]:
    with _open(source) as stream:
        if source.skip_undecodable:
            content = stream.read()
            if not _is_utf8(content):
                skipped["undecodable"] += 1
                return
            stream = io.BytesIO(content)
        start = 0
        for piece in _cut(stream, skipped):
            try:
                piece.text.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"--input={source.path} is not UTF-8 text: byte "
                    f"{start + error.start} is {error.object[error.start]:#04x}; "
                    "convert it, for example with `iconv -t utf-8`, or leave it out (a "
                    "glob such as 'folder/**/*.txt' takes the texts of a folder)."
                ) from error
            start += len(piece.text)
            yield piece


def _read_jsonl(
    source: Source, text_field: str, skipped: collections.Counter
) -> Iterator[Piece]:
    with _open(source) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            place = f"--input={source.path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{place} is not a line of JSON: {error}; correct or remove it."
                ) from error
            if not isinstance(row, dict) or text_field not in row:
                has = ", ".join(row) if isinstance(row, dict) else "no fields"
                raise InputError(
                    f"{place} has no --text_field={text_field}; it has {has}."
                )
            yield from _cut_value(
                row[text_field], place, text_field, len(line), skipped
            )


def _read_parquet(
    source: Source, text_field: str, skipped: collections.Counter
) -> Iterator[Piece]:
    pyarrow = _import_pyarrow(source.path)
    try:
        with pyarrow.parquet.ParquetFile(source.path, memory_map=True) as table:
            if text_field not in table.schema_arrow.names:
                raise InputError(
                    f"--input={source.path} has no --text_field={text_field}; it has "
                    f"{', '.join(table.schema_arrow.names)}."
                )
            row_bytes = source.num_bytes // max(table.metadata.num_rows, 1)
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    place = f"--input={source.path}, row {number}"
                    yield from _cut_value(value, place, text_field, row_bytes, skipped)
                    number += 1
    except pyarrow.ArrowException as error:
        raise InputError(
            f"--input={source.path} is not a readable parquet file: {error}; write it "
            "again or leave it out."
        ) from error


def _import_pyarrow(path: str) -> Any:
    try:
        import pyarrow.parquet  # an optional extra, imported only here
    except ImportError as error:
        raise InputError(
            f"--input={path} needs pyarrow to be read; `pip install jaxllm[parquet]`."
        ) from error
    return pyarrow


def _cut_value(
    value: Any, place: str, field: str, source_bytes: int, skipped: collections.Counter
) -> Iterator[Piece]:
    if not isinstance(value, str):
        raise InputError(
            f"{place} has a {type(value).__name__} in --text_field={field}, where text "
            "must be; correct or remove it."
        )
    try:
        text = value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} has half a surrogate pair at character {error.start} of its "
            "text, which is not a character; correct or remove it."
        ) from error
    for piece in _cut(io.BytesIO(text), skipped):
        yield piece._replace(source_bytes=source_bytes if piece.is_last else 0)


def _cut(stream: BinaryIO, skipped: collections.Counter) -> Iterator[Piece]:
    """Yields one document in pieces of about PIECE_BYTES."""
    rest = stream.read(PIECE_BYTES)
    if not rest:
        skipped["empty"] += 1
        return
    is_first = True
    while following := stream.read(PIECE_BYTES):
        at = _border(rest)
        yield Piece(rest[:at], is_first, False, at)
        rest, is_first = rest[at:] + following, False
    yield Piece(rest, is_first, True, len(rest))


def _border(text: bytes) -> int:
    """Returns where to split, in the last bytes of a text that continues."""
    window = max(len(text) // 2, len(text) - _BORDER_BYTES)
    for border in _BORDERS:
        if found := collections.deque(border.finditer(text, window), maxlen=1):
            return found[0].end()
    for at in range(len(text) - 1, max(len(text) - 4, 0), -1):
        if text[at] & 0xC0 != 0x80:  # the first byte of a character
            return at
    return len(text)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True

# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of JSON and Parquet sources, one document each."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from jaxllm.errors import InputError
from jaxllm.text.sources import Source
from jaxllm.text.streams import Opened, import_pyarrow, open_source

_BLOCK_BYTES = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_WORD = 16  # characters of JSON, outside of strings, that belong together


class InvalidRowError(InputError):
    """A row without a text; it can be left out."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class Row(NamedTuple):
    """A row, or the error that says why it is none."""

    place: str
    value: Any | InvalidRowError
    source_bytes: int = 0  # of the file, if they cannot be told from its position


def read_json(source: Source, opened: Opened) -> Iterator[Row]:
    """Yields the rows of JSON lines or, where a .json begins so, of an array."""
    if source.kind == "json" and _begins_array(source):
        return _read_array(source, opened.stream)
    return _read_lines(source, opened.stream)


def read_parquet(source: Source, text_field: str) -> Iterator[Row]:
    """Yields the rows of a Parquet file, with the field of the text only."""
    pyarrow = import_pyarrow(source.path)
    try:
        with pyarrow.parquet.ParquetFile(source.path, memory_map=True) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise InputError(
                    f"--input={source.path} has no --text_field={text_field}; it has "
                    f"{', '.join(names)}."
                )
            row_bytes = source.num_bytes // max(table.metadata.num_rows, 1)
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    place = f"--input={source.path}, row {number}"
                    yield Row(place, {text_field: value}, row_bytes)
                    number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(
            f"--input={source.path} is not a readable parquet file: {error}; write it "
            "again or leave it out."
        ) from error


def text_of(row: Row, text_field: str) -> bytes:
    """Returns the UTF-8 text of a row.

    Raises:
      InvalidRowError: it has none.
    """
    place, value, _ = row
    remedy = "correct or remove it, or give --skip_invalid_rows."
    if isinstance(value, InvalidRowError):
        raise value
    if not isinstance(value, dict) or text_field not in value:
        has = ", ".join(value) if isinstance(value, dict) else "no fields"
        raise InvalidRowError(
            f"{place} has no --text_field={text_field}; it has {has}: give the name of "
            "the text; --skip_invalid_rows leaves out rows without it.",
            f"no field {text_field}",
        )
    text = value[text_field]
    if not isinstance(text, str):
        raise InvalidRowError(
            f"{place} has a {type(text).__name__} in --text_field={text_field}, where "
            f"text must be; {remedy}",
            f"no text in {text_field}",
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRowError(
            f"{place} has half a surrogate pair at character {error.start} of its "
            f"text, which is not a character; {remedy}",
            "half a surrogate pair",
        ) from error


def looks_like_json(head: bytes, text_field: str) -> str:
    """Returns whether a text begins as "lines" or an "array" of rows, or "" if not."""
    begin = re.match(rb"\s*(\[?)\s*(?=\{)", head)
    if begin is None:
        return ""
    kind = "array" if begin[1] else "lines"
    try:
        text = head[begin.end() :].decode(errors="replace")
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # as where the first row is longer
        key = re.escape(json.dumps(text_field, ensure_ascii=False).encode())
        return kind if re.match(rb"\{\s*" + key + rb"\s*:", head[begin.end() :]) else ""
    return kind if text_field in value else ""


def _begins_array(source: Source) -> bool:
    with open_source(source) as opened:
        head = opened.stream.read(_BLOCK_BYTES)
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _read_lines(source: Source, stream: BinaryIO) -> Iterator[Row]:
    is_json = source.kind == "json"
    hint = " (a .json file is an array of objects, or one object a line)"
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        place = f"--input={source.path}:{number}"
        try:
            yield Row(place, json.loads(line))
        except (ValueError, RecursionError) as error:
            message = (
                f"{place} is not a line of JSON: {error}{hint if is_json else ''}; "
                "correct or remove it, or give --skip_invalid_rows."
            )
            yield Row(place, InvalidRowError(message, "not JSON"))


def _read_array(source: Source, stream: BinaryIO) -> Iterator[Row]:
    array = _Array(stream)
    try:
        for number, value in enumerate(array):
            yield Row(f"--input={source.path}, element {number}", value)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--input={source.path} is not a JSON array: {error}; write it again, or "
            "leave it out."
        ) from error


class _Array:
    """The elements of a JSON array, of which few are in memory at a time."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._is_end = "", 0, False

    def __iter__(self) -> Iterator[Any]:
        self._expect("[")
        separator = ","
        if self._next() == "]":
            separator = self._expect("]")
        while separator == ",":
            yield self._value()
            separator = self._expect(",", "]")
        if self._next():
            raise ValueError("there is more behind its end")

    def _next(self) -> str:
        """Returns the next character that is no space, "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text) or self._is_end:
                return self._text[self._at : self._at + 1]
            self._read()

    def _expect(self, *characters: str) -> str:
        found = self._next()
        if found not in characters or not found:
            raise ValueError(
                f"{' or '.join(characters)} expected, not {found or 'its end'}"
            )
        self._at += 1
        return found

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                near_end = error.pos > len(self._text) - _LONGEST_WORD
                if self._is_end or not (near_end or "Unterminated" in error.msg):
                    raise
            else:
                if end < len(self._text) or self._is_end:  # else a number may go on
                    self._at = end
                    return value
            self._read()

    def _read(self):
        rest = self._text[self._at :]
        block = self._stream.read(max(_BLOCK_BYTES, len(rest)))  # parsed again: doubled
        self._is_end = not block
        self._text = rest + self._utf8.decode(block, final=self._is_end)
        self._at = 0

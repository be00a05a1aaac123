# SPDX-License-Identifier: Apache-2.0
"""Opens inputs as streams of bytes: files, compressed files, standard input."""

import bz2
import contextlib
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from jaxllm.errors import InputError
from jaxllm.text.sources import STDIN, Source


class Opened(NamedTuple):
    """An input that is being read."""

    stream: BinaryIO
    position: Callable[[], int] | None  # bytes of the file read so far, if it is one


@contextlib.contextmanager
def open_source(source: Source) -> Iterator[Opened]:
    """Opens a source, decompressed; memory does not grow with its length."""
    if source.path == STDIN:
        yield Opened(sys.stdin.buffer, None)
        return
    with open(source.path, "rb") as file:
        if source.compression is None:
            yield Opened(file, file.tell)
            return
        with _decompress(source, file) as stream:
            yield Opened(stream, file.tell)


@contextlib.contextmanager
def explained(source: Source) -> Iterator[None]:
    """Turns what can go wrong while a source is read into one message."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        what = "cannot be read"
        if source.compression:
            what = f"cannot be read as {source.compression}, perhaps it is cut off"
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--input={source.path} {what}: {reason}; make it readable or leave it out."
        ) from error


def import_pyarrow(path: str) -> Any:
    """Returns pyarrow, an optional extra."""
    try:
        import pyarrow.parquet  # an optional extra, imported only here
    except ImportError as error:
        raise InputError(
            f"--input={path} needs pyarrow to be read; `pip install jaxllm[parquet]`."
        ) from error
    return pyarrow


def _decompress(source: Source, file: BinaryIO) -> BinaryIO:
    if source.compression == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if source.compression == "bz2":
        return cast(BinaryIO, bz2.BZ2File(file))
    if source.compression == "xz":
        return cast(BinaryIO, lzma.LZMAFile(file))
    pyarrow = import_pyarrow(source.path)
    # pyarrow's own stream has no lines.
    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))

# SPDX-License-Identifier: Apache-2.0
"""Finds the files of --input: files, folders, globs, stdin, the standard library."""

import dataclasses
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Literal

from jaxllm.errors import InputError

STDIN = "-"
STDLIB = "python:stdlib"

# Tests are two thirds of the standard library's source; the rest is 12 MB.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A file of text, or standard input."""

    path: str  # - is standard input
    kind: Literal["text", "jsonl", "parquet"]
    num_bytes: int  # 0 if unknown
    mtime_ns: int = 0
    skip_undecodable: bool = False  # otherwise refuse the input


def find_sources(inputs: Sequence[str], *, stdin_format: str) -> tuple[Source, ...]:
    """Returns the files that inputs name; folders are searched recursively, by path.

    Hidden files and folders within a folder or a glob are skipped.
    """
    if list(inputs).count(STDIN) > 1:
        raise InputError(
            "--input=- is given twice, but can be read once; give it once."
        )
    sources = [source for each in inputs for source in _find(each, stdin_format)]
    if not sources:
        raise InputError(
            "--input is missing; give a file, folder, glob, - or " + STDLIB
        )
    return tuple(sources)


def hash_sources(sources: Sequence[Source]) -> str:
    """Returns a hash of the names, sizes and times of files, without their content."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(
            repr(dataclasses.astuple(source)).encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def _find(name: str, stdin_format: str) -> Iterator[Source]:
    if name == STDIN:
        kind = "jsonl" if stdin_format == "jsonl" else "text"
        yield Source(path=STDIN, kind=kind, num_bytes=0)
    elif name == STDLIB:
        folder = sysconfig.get_path("stdlib")
        for path in _walk(folder):
            inside = os.path.relpath(path, folder).split(os.sep)
            if path.endswith(".py") and not _NOT_STDLIB & set(inside):
                yield _file_source(path, skip_undecodable=True)
    else:
        for path in _files(name):
            yield _file_source(path)


def _files(name: str) -> list[str]:
    if os.path.isdir(name):
        found = list(_walk(name))
    elif os.path.exists(name):
        return [name]
    else:
        found = sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p))
    if not found:
        state = "holds no files" if os.path.isdir(name) else "does not exist"
        raise InputError(
            f"--input={name} {state}; give a file, a folder of files, a glob such as "
            f"'texts/**/*.txt', - for standard input, or {STDLIB}."
        )
    return found


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError):
        raise InputError(
            f"--input={folder}: {error.filename} cannot be read: {error.strerror}; "
            "make it readable or leave it out."
        ) from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.join(parent, name)


def _file_source(path: str, *, skip_undecodable: bool = False) -> Source:
    extension = os.path.splitext(path)[1].lower()
    if extension in (".gz", ".zst", ".bz2", ".xz", ".zip"):
        raise InputError(
            f"--input={path} is compressed; decompress it into standard input, as in "
            f"`zcat {path} | python -m jaxllm.tokenize --input - ...`."
        )
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(
            f"--input={path} cannot be read: {error.strerror}; make it readable or "
            "leave it out."
        ) from error
    kinds: dict[str, Literal["jsonl", "parquet"]]
    kinds = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
    return Source(
        path=path,
        kind=kinds.get(extension, "text"),
        num_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        skip_undecodable=skip_undecodable,
    )

# SPDX-License-Identifier: Apache-2.0
"""Finds the files of --input: files, folders, globs, stdin, the standard library."""

import dataclasses
import glob
import hashlib
import os
import stat
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Literal

from jaxllm.errors import InputError

STDIN = "-"
STDLIB = "python:stdlib"

Kind = Literal["text", "jsonl", "json", "parquet"]  # json is decided by its content

_KINDS: dict[str, Kind]
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
_OTHER_COMPRESSIONS = (".z", ".lz4", ".lzma", ".br", ".zstd", ".snappy", ".sz")

# Tests are two thirds of the standard library's source; the rest is 12 MB.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A file of text, or standard input."""

    path: str  # - is standard input
    kind: Kind
    num_bytes: int  # of the file, perhaps compressed; 0 if unknown
    mtime_ns: int = 0
    skip_undecodable: bool = False  # otherwise refuse the input

    @property
    def compression(self) -> str | None:
        """Returns how the file is compressed, by its name."""
        return _COMPRESSIONS.get(os.path.splitext(self.path)[1].lower())


def find_sources(inputs: Sequence[str], *, stdin_format: str) -> tuple[Source, ...]:
    """Returns the files that inputs name; folders are searched recursively, by path.

    Hidden files and folders within a folder or a glob are skipped. Links to folders are
    followed; a folder is read once, however many links lead to it.
    """
    if list(inputs).count(STDIN) > 1:
        raise InputError(
            "--input=- is given twice, but can be read once; give it once."
        )
    if stdin_format != "text" and STDIN not in inputs:
        raise InputError(
            f"--stdin_format={stdin_format} is for --input=-, which is not given; "
            "files are read by their names (.jsonl, .json, .parquet, else text): leave "
            "it out."
        )
    sources = [source for each in inputs for source in _find(each, stdin_format)]
    if not sources:
        raise InputError(
            "--input is missing; give a file, folder, glob, - or " + STDLIB
        )
    _check_read_once(sources)
    return tuple(sources)


def hash_sources(sources: Sequence[Source]) -> str:
    """Returns a hash of the names, sizes and times of files, without their content."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(
            repr(dataclasses.astuple(source)).encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def check_regular(what: str, mode: int):
    """Refuses what would not end, or block, when it is read as a file."""
    kinds = {
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFDIR: "a folder",
    }
    if kind := kinds.get(stat.S_IFMT(mode)):
        raise InputError(
            f"{what} is {kind}, not a file; give a file, or pipe text into "
            "`python -m jaxllm.tokenize --input - --output DIR`."
        )


def _find(name: str, stdin_format: str) -> Iterator[Source]:
    if name == STDIN:
        if sys.stdin is None:
            raise InputError(
                "--input=- is standard input, which is closed; pipe text into it, or "
                "give a file."
            )
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
    elif os.path.lexists(name):
        return [name]
    else:
        found = _expand(name)
    if not found:
        state = "holds no files" if os.path.isdir(name) else "does not exist"
        raise InputError(
            f"--input={name} {state}; give a file, a folder of files, a glob such as "
            f"'texts/**/*.txt', - for standard input, or {STDLIB}."
        )
    return found


def _expand(pattern: str) -> list[str]:
    """Returns the files of a glob, once each: links to folders may form loops.

    `glob` itself would follow them 40 times, in each of as many folders.
    """
    before, stars, after = f"/{pattern}".partition("/**")
    if not stars or after[:1] not in ("", "/"):
        return sorted(path for path in glob.glob(pattern) if not os.path.isdir(path))
    found = {}
    tops = glob.glob(before[1:] or "/") if before else ["."]
    for top in filter(os.path.isdir, tops):
        for folder, _ in _folders(top):
            inside = os.path.join(glob.escape(folder), after[1:] or "*")
            for path in _expand(inside):
                parent, name = os.path.split(path)
                place = os.path.realpath(parent), name
                found.setdefault(place, path if before else path.removeprefix("./"))
    return sorted(found.values())


def _walk(top: str) -> Iterator[str]:
    for folder, files in _folders(top):
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.join(folder, name)


def _folders(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yields a folder and those below, also behind links, once each, with files."""

    def refuse(error: OSError):
        raise InputError(
            f"--input={top}: {error.filename} cannot be read: {error.strerror}; "
            "make it readable or leave it out."
        ) from error

    def is_new(path: str) -> bool:
        status = os.stat(path)
        identity = status.st_dev, status.st_ino
        if identity in seen:
            print(f"note: {path} is a folder that is read already.", file=sys.stderr)
            return False
        seen.add(identity)
        return True

    seen = set()
    is_new(top)
    for parent, folders, files in os.walk(top, onerror=refuse, followlinks=True):
        yield parent, files
        shown = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in shown if is_new(os.path.join(parent, name))]


def _file_source(path: str, *, skip_undecodable: bool = False) -> Source:
    root, extension = os.path.splitext(path.lower())
    inner = extension
    if extension in _COMPRESSIONS:
        inner = os.path.splitext(root)[1]
    if inner in _ARCHIVES:
        raise InputError(
            f"--input={path} is an archive; unpack it into a folder (`tar -xf`, "
            "`python -m zipfile -e`) and give the folder."
        )
    if extension in _OTHER_COMPRESSIONS or (inner == ".parquet" and inner != extension):
        raise InputError(
            f"--input={path} is compressed in a way that is not read; decompress it. "
            "Text and JSON may be " + ", ".join(_COMPRESSIONS) + "."
        )
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(
            f"--input={path} cannot be read: {error.strerror}; make it readable or "
            "leave it out."
        ) from error
    check_regular(f"--input={path}", status.st_mode)
    return Source(
        path=path,
        kind=_KINDS.get(inner, "text"),
        num_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        skip_undecodable=skip_undecodable,
    )


def _check_read_once(sources: Sequence[Source]):
    seen = {}
    for source in sources:
        path = os.path.realpath(source.path)
        if path in seen:
            also = "" if seen[path] == source.path else f", also as {seen[path]}"
            raise InputError(
                f"--input={source.path} is given twice{also}; give each file once."
            )
        seen[path] = source.path

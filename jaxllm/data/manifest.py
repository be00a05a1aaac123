# SPDX-License-Identifier: Apache-2.0
"""The manifest of a token folder: its files, sizes, hashes and tokenizer.

A token folder holds, for each split (`train`, `eval`), flat little-endian token files
(`train-00000.bin`, uint16 or uint32, no header), one file with the exclusive end of
each document in the split (`train-ends.bin`, int64), `tokenizer.json` unless tokens
are bytes, and `manifest.json`, written last: a folder without it is not finished.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxllm.errors import InputError

FORMAT = "jaxllm tokens 1"  # the number changes with the layout or the tokenization
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
PARTIAL = ".jaxllm-partial"  # within the folder: the files of an unfinished command
ENDS_DTYPE = "<i8"
MAX_VOCAB = 2**31  # ids are int32 on the devices

_BLOCK_BYTES = 2**22


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFile:
    """One flat file of numbers."""

    name: str  # within the folder
    num_items: int  # tokens, or documents
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """The files of one split, in order."""

    num_tokens: int
    num_documents: int
    sha256: str  # of all tokens and boundaries, independent of the split into files
    shards: tuple[DataFile, ...]
    ends: DataFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer that made the tokens."""

    kind: str  # bytes or hf
    vocab_size: int
    end_of_document: int | None  # id of the token after each document
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished token folder."""

    dtype: str  # of the tokens, uint16 or uint32
    tokenizer: TokenizerEntry
    settings: dict[str, Any]  # of the command that made it
    splits: dict[str, SplitEntry]

    @property
    def end_of_document(self) -> int | None:
        """The token that every document ends in, if the command appended one."""
        appended = self.settings["append_end_of_document"]
        return self.tokenizer.end_of_document if appended else None

    @property
    def files(self) -> list[str]:
        """Names of all files except the manifest itself."""
        names = [TOKENIZER] if self.tokenizer.kind == "hf" else []
        for split in self.splits.values():
            names += [file.name for file in (*split.shards, split.ends)]
        return names


def token_dtype(vocab_size: int) -> str:
    """Returns the smallest dtype of token files that can hold every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_manifest(folder: str, manifest: Manifest):
    """Writes the manifest atomically."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    path = os.path.join(folder, MANIFEST)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def read_manifest(folder: str) -> Manifest:
    """Reads and checks a manifest, but not the files that it names."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise _damaged(path, f"it is not JSON ({error})") from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{path} has format {found!r}, but this version reads {FORMAT!r}; make the "
            "folder again with `python -m jaxllm.tokenize`."
        )
    try:
        manifest = _parse_manifest(content)
    except (TypeError, ValueError, KeyError) as error:
        raise _damaged(path, str(error)) from error
    return manifest


def hash_file(path: str, *also: Any) -> str:
    """Returns the SHA-256 of a file, and updates the hashes in `also` by the way."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            for each in (digest, *also):
                each.update(block)
    return digest.hexdigest()


def describe_split(
    folder: str, dtype: str, shard_names: Iterable[str], ends_name: str
) -> SplitEntry:
    """Reads the files of a split and returns their sizes and hashes."""
    whole = hashlib.sha256(dtype.encode())
    itemsize = np.dtype(dtype).itemsize
    shards = []
    for name in shard_names:
        path = os.path.join(folder, name)
        num_items = os.path.getsize(path) // itemsize
        sha256 = hash_file(path, whole)
        shards.append(DataFile(name=name, num_items=num_items, sha256=sha256))
    path = os.path.join(folder, ends_name)
    num_documents = os.path.getsize(path) // np.dtype(ENDS_DTYPE).itemsize
    sha256 = hash_file(path, whole)
    ends = DataFile(name=ends_name, num_items=num_documents, sha256=sha256)
    return SplitEntry(
        num_tokens=sum(shard.num_items for shard in shards),
        num_documents=num_documents,
        sha256=whole.hexdigest(),
        shards=tuple(shards),
        ends=ends,
    )


def _parse_manifest(content: dict) -> Manifest:
    for name in ("settings", "splits"):
        if not isinstance(content[name], dict):
            raise ValueError(f"{name} is no object")
    splits = _parse_splits(content["splits"])
    tokenizer = _parse(TokenizerEntry, content["tokenizer"])
    manifest = _parse(Manifest, {**content, "tokenizer": tokenizer, "splits": splits})
    appended = manifest.settings["append_end_of_document"]
    if not isinstance(appended, bool):
        raise ValueError(f"append_end_of_document is {appended!r}")
    if tokenizer.vocab_size > MAX_VOCAB:
        raise ValueError(f"its vocabulary of {tokenizer.vocab_size} exceeds int32")
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype is {manifest.dtype!r}")
    if any(os.path.basename(name) != name for name in manifest.files):
        raise ValueError("a file name leaves the folder")
    return manifest


def _parse_splits(content: dict) -> dict[str, SplitEntry]:
    splits = {}
    for name, split in content.items():
        if name not in ("train", "eval"):
            raise ValueError(f"unknown split {name!r}")
        shards = tuple(_parse(DataFile, shard) for shard in split["shards"])
        ends = _parse(DataFile, split["ends"])
        entry = _parse(SplitEntry, {**split, "shards": shards, "ends": ends})
        if entry.num_tokens != sum(shard.num_items for shard in entry.shards):
            raise ValueError(f"num_tokens of {name} is not the sum of its shards")
        if entry.num_documents != ends.num_items:
            raise ValueError(f"num_documents of {name} is not that of {ends.name}")
        splits[name] = entry
    return splits


def _parse(cls, content: dict):
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    if set(content) != set(fields):
        raise ValueError(f"it should have the keys {', '.join(fields)}")
    for name, kind in fields.items():
        value = content[name]
        if kind in (int, str, int | None) and not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r}")
        if isinstance(value, int) and value < 0:
            raise ValueError(f"{name} is {value}")
    return cls(**content)


def _damaged(path: str, why: str) -> InputError:
    return InputError(
        f"{path} is damaged: {why}; copy the folder again, or delete it and make it "
        "again with `python -m jaxllm.tokenize`."
    )

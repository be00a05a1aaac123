# SPDX-License-Identifier: Apache-2.0
"""Opens every token file format through one interface.

| path | read as |
|---|---|
| folder with manifest.json | token folder of `python -m jaxllm.tokenize` |
| .bin with a neighbouring .idx | Megatron-LM's IndexedDataset |
| .bin that starts with 20240520 or 20240801 | llm.c, modded-nanogpt: uint16, uint32 |
| any other .bin | nanoGPT: raw uint16; raw uint32 where the settings say so |
| folder or glob of .bin files | all of them, sorted by name |

In a folder without a manifest, files with a word like `val` in their name are its eval
split, as nanoGPT, llm.c and modded-nanogpt name them. Everything else is `train`.
"""

import bisect
import dataclasses
import functools
import glob
import itertools
import os
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxllm.config.sections import RawDtype
from jaxllm.data.foreign import ForeignFile, open_foreign
from jaxllm.data.manifest import (
    ENDS_DTYPE,
    MANIFEST,
    MAX_VOCAB,
    PARTIAL,
    TOKENIZER,
    DataFile,
    describe_split,
    hash_file,
    read_manifest,
)
from jaxllm.data.sample import common_end, occurrences, sampled_hash
from jaxllm.data.token_file import TokenFile, check_ends, read_numbers
from jaxllm.errors import InputError

_EVAL_NAME = re.compile(r"(?<![a-z])(val|valid|validation|eval|test)(?![a-z])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """The tokens of one split of one path, as if in one array.

    Two splits have the same fingerprint if their tokens and boundaries are the same, as
    far as a sample tells: `jaxllm.data.sample`.
    """

    path: str  # as the user wrote it
    shards: tuple[TokenFile | np.ndarray, ...]  # 1-D, none of them empty
    document_ends: np.ndarray | None  # int64, exclusive, ascending; None: not listed
    end_of_document: int | None  # the token that documents end in; None: not known
    vocab_size: int  # above every id
    vocab_known: bool  # False: vocab_size is only the limit of the files' dtype
    fingerprint: str  # hex
    tokenizer: str | None  # hash of the tokenizer, if known

    @property
    def num_tokens(self) -> int:
        """Tokens in all shards."""
        return self._starts[-1]

    @property
    def num_targets(self) -> int:
        """Tokens that can be predicted: all, or all but the first of each document."""
        if self.end_of_document is not None:
            return self.num_tokens
        ends = self.document_ends
        documents = 1 if ends is None else np.count_nonzero(np.diff(ends, prepend=0))
        return self.num_tokens - int(documents)

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens [start, stop) as a new int32 array.

        Where the end-of-document token is known it is also token -1: the first document
        has it before itself, as the others do.
        """
        last = self.end_of_document
        if not -(last is not None) <= start <= stop <= self.num_tokens:
            raise IndexError(
                f"[{start}, {stop}) is not within {self.num_tokens} tokens"
            )
        out = np.empty(stop - start, np.int32)
        done = int(start < 0 and stop > start)
        if done and last is not None:
            out[0] = last
        shard = bisect.bisect_right(self._starts, start + done) - 1
        while done < stop - start:
            first = start + done - self._starts[shard]
            part = self.shards[shard][first : first + stop - start - done]
            if part.dtype.itemsize == 4 and part.max() > _LARGEST_ID:
                raise InputError(
                    f"{self.path} has the token {part.max()}, and ids go up to "
                    f"{_LARGEST_ID}; it is damaged, or of another format."
                )
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return out

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(len(shard) for shard in self.shards)]


_LARGEST_ID = MAX_VOCAB - 1


def open_tokens(
    path: str,
    split: Literal["train", "eval"],
    *,
    raw_dtype: RawDtype = "auto",
    end_of_document: int | None = None,
) -> TokenSplit | None:
    """Opens a split of a token folder, a .bin file, or a glob of them.

    Returns None if the path is valid but has no such split.

    Args:
      path: as in `config.data.paths`.
      split: the part of it.
      raw_dtype: of files without a header.
      end_of_document: of files that do not list their documents; None takes the one
        that is usual for the format, if the file has it.
    """
    if os.path.exists(os.path.join(path, MANIFEST)):
        return _open_folder(path, split)
    files = _foreign_files(path, split)
    if not files:
        return None
    opened = [open_foreign(file, raw_dtype) for file in files]
    kinds = {file.kind for file in opened}
    if len(kinds) > 1:
        raise InputError(
            f"{path} holds token files of different formats ({', '.join(sorted(kinds))}"
            "); name those that belong together by a glob."
        )
    shards = tuple(file.tokens for file in opened if len(file.tokens))
    if not shards:
        raise InputError(f"{path} holds no tokens; name a file that does.")
    tops = [min(np.iinfo(shard.dtype).max, _LARGEST_ID) for shard in shards]
    found = TokenSplit(
        path=path,
        shards=shards,
        document_ends=_join_ends(opened),
        end_of_document=None,
        vocab_size=max(tops) + 1,
        vocab_known=False,
        fingerprint="",
        tokenizer=None,
    )
    if found.document_ends is None:
        last = (
            _usual_end(found, opened[0]) if end_of_document is None else end_of_document
        )
    else:
        last = common_end(found.slice, found.document_ends)
    hashed = sampled_hash(found.num_tokens, found.slice, found.document_ends, "")
    return dataclasses.replace(found, end_of_document=last, fingerprint=hashed)


def verify(folder: str):
    """Reads every byte of a token folder and raises InputError if one has changed."""
    manifest = read_manifest(folder)
    for name, split in manifest.splits.items():
        for file in split.shards:
            _check_size(folder, file, manifest.dtype)
        _check_size(folder, split.ends, ENDS_DTYPE)
        names = [file.name for file in split.shards]
        found = describe_split(folder, manifest.dtype, names, split.ends.name)
        pairs = zip(
            (*split.shards, split.ends), (*found.shards, found.ends), strict=True
        )
        for file, now in pairs:
            if file.sha256 != now.sha256:
                raise _changed(os.path.join(folder, file.name), file.sha256, now.sha256)
        if split.sha256 != found.sha256:
            path = f"{os.path.join(folder, MANIFEST)} (splits.{name})"
            raise _changed(path, split.sha256, found.sha256)
    if manifest.tokenizer.kind == "hf":
        path = os.path.join(folder, TOKENIZER)
        try:
            sha256 = hash_file(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from error
        if sha256 != manifest.tokenizer.sha256:
            raise _changed(path, manifest.tokenizer.sha256, sha256)


def _open_folder(folder: str, name: str) -> TokenSplit | None:
    manifest = read_manifest(folder)
    if name not in manifest.splits:
        return None
    split = manifest.splits[name]
    for file in split.shards:
        _check_size(folder, file, manifest.dtype)
    _check_size(folder, split.ends, ENDS_DTYPE)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    last = manifest.end_of_document
    ends_path = os.path.join(folder, split.ends.name)
    ends = read_numbers(ends_path, np.dtype(ENDS_DTYPE))
    check_ends(ends_path, ends, split.num_tokens, empty=last is None)
    opened = TokenSplit(
        path=folder,
        shards=tuple(
            TokenFile(os.path.join(folder, file.name), dtype)
            for file in split.shards
            if file.num_items
        ),
        document_ends=_without_empty(ends),
        end_of_document=last,
        vocab_size=manifest.tokenizer.vocab_size,
        vocab_known=True,
        fingerprint="",
        tokenizer=manifest.tokenizer.sha256,
    )
    hashed = sampled_hash(opened.num_tokens, opened.slice, ends, split.sha256)
    return dataclasses.replace(opened, fingerprint=hashed)


def _foreign_files(path: str, split: str) -> list[str]:
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, PARTIAL)):
            raise InputError(
                f"{path} is not finished: `python -m jaxllm.tokenize` is still running "
                "or was stopped; run the same command again."
            )
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.bin")))
        if not found:
            raise InputError(
                f"{path} holds neither manifest.json nor .bin files; make tokens with "
                f"`python -m jaxllm.tokenize --input TEXT --output {path}`."
            )
        return [
            file
            for file in found
            if bool(_EVAL_NAME.search(os.path.basename(file).lower()))
            == (split == "eval")
        ]
    if os.path.isfile(path + ".bin") and os.path.isfile(path + ".idx"):
        path += ".bin"  # Megatron's tools name the pair by its common beginning
    found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not found:
        raise InputError(
            f"{path} does not exist; give a folder made by `python -m "
            "jaxllm.tokenize`, or .bin files."
        )
    for file in found:
        if not file.endswith(".bin"):
            raise InputError(
                f"{file} is not a token file, because its name does not end in .bin; "
                f"make tokens with `python -m jaxllm.tokenize --input {file} --output "
                "DIR`, and give DIR."
            )
    return found if split == "train" else []


def _join_ends(files: Sequence[ForeignFile]) -> np.ndarray | None:
    joined, start = [], 0
    for file in files:
        if file.ends is None:
            return None
        joined.append(file.ends + start)
        start += len(file.tokens)
    return _without_empty(np.concatenate(joined))


def _without_empty(ends: np.ndarray) -> np.ndarray:
    """Returns the ends of the documents that have tokens."""
    return ends[np.diff(ends, prepend=0) > 0]


def _usual_end(split: TokenSplit, file: ForeignFile) -> int | None:
    """Returns the token that its format puts between documents, if the sample has it.

    Not if it has ids beyond the vocabulary of that token too.
    """
    if file.usual is None:
        return None
    count, largest = occurrences(split.num_tokens, split.slice, file.usual.token)
    return file.usual.token if count and largest < file.usual.vocab_size else None


def _check_size(folder: str, file: DataFile, dtype: str):
    path = os.path.join(folder, file.name)
    size = os.path.getsize(path) if os.path.exists(path) else None
    expected = file.num_items * np.dtype(dtype).itemsize
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes"
        raise InputError(
            f"{path} {found}, but manifest.json says {expected} bytes; copy the folder "
            "again, or make it again with `python -m jaxllm.tokenize`."
        )


def _changed(path: str, expected: str, found: str) -> InputError:
    return InputError(
        f"{path} has changed: its SHA-256 is {found[:16]}..., but manifest.json says "
        f"{expected[:16]}...; copy the folder again, or make it again with "
        "`python -m jaxllm.tokenize`."
    )

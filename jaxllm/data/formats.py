# SPDX-License-Identifier: Apache-2.0
"""Opens every token file format through one interface.

| path | read as |
|---|---|
| folder with manifest.json | token folder of `python -m jaxllm.tokenize` |
| .bin with a neighbouring .idx | Megatron-LM's IndexedDataset |
| .bin that starts with 20240520 or 20240801 | llm.c, modded-nanogpt: uint16, uint32 |
| any other .bin | nanoGPT: raw uint16 |
| folder or glob of .bin files | all of them, sorted by name |

In a folder without a manifest, files with a word like `val` in their name are its eval
split, as nanoGPT, llm.c and modded-nanogpt name them. Everything else is `train`.
"""

import bisect
import dataclasses
import functools
import glob
import hashlib
import itertools
import os
import re
from typing import Literal

import numpy as np

from jaxllm.data.foreign import map_file, open_foreign
from jaxllm.data.manifest import (
    ENDS_DTYPE,
    MANIFEST,
    PARTIAL,
    TOKENIZER,
    DataFile,
    describe_split,
    hash_file,
    read_manifest,
)
from jaxllm.errors import InputError

_EVAL_NAME = re.compile(r"(?<![a-z])(val|valid|validation|eval|test)(?![a-z])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """The tokens of one split of one path, as if in one array.

    Two splits have the same fingerprint if their tokens and boundaries are the same.
    For foreign files it is of a sample: the number of tokens and 256 blocks of 4096.
    """

    path: str  # as the user wrote it
    shards: tuple[np.ndarray, ...]  # 1-D, memory-mapped, read-only, none of them empty
    document_ends: np.ndarray | None  # int64, exclusive; None if the format has none
    vocab_size: int  # above every id
    vocab_known: bool  # False: vocab_size is only the limit of the files' dtype
    fingerprint: str  # hex
    tokenizer: str | None  # hash of the tokenizer, if known

    @property
    def num_tokens(self) -> int:
        return self._starts[-1]

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens [start, stop) as a new int32 array."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(
                f"[{start}, {stop}) is not within {self.num_tokens} tokens"
            )
        out = np.empty(stop - start, np.int32)
        shard = bisect.bisect_right(self._starts, start) - 1
        done = 0
        while done < stop - start:
            first = start + done - self._starts[shard]
            part = self.shards[shard][first : first + stop - start - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return out

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(len(shard) for shard in self.shards)]


def open_tokens(path: str, split: Literal["train", "eval"]) -> TokenSplit | None:
    """Opens a split of a token folder, a .bin file, or a glob of them.

    Returns None if the path is valid but has no such split.
    """
    if os.path.exists(os.path.join(path, MANIFEST)):
        return _open_folder(path, split)
    files = _foreign_files(path, split)
    if not files:
        return None
    opened = [open_foreign(file) for file in files]
    kinds = {kind for kind, _, _ in opened}
    if len(kinds) > 1:
        raise InputError(
            f"{path} holds token files of different formats ({', '.join(sorted(kinds))}"
            "); name those that belong together by a glob."
        )
    shards = tuple(array for _, array, _ in opened if len(array))
    if not shards:
        raise InputError(f"{path} holds no tokens; name a file that does.")
    unhashed = TokenSplit(
        path=path,
        shards=shards,
        document_ends=_join_ends([(array, ends) for _, array, ends in opened]),
        vocab_size=max(min(np.iinfo(shard.dtype).max, 2**31 - 1) for shard in shards)
        + 1,
        vocab_known=False,
        fingerprint="",
        tokenizer=None,
    )
    return dataclasses.replace(unhashed, fingerprint=_sampled_hash(unhashed))


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
    return TokenSplit(
        path=folder,
        shards=tuple(
            map_file(os.path.join(folder, s.name), dtype) for s in split.shards
        ),
        document_ends=map_file(
            os.path.join(folder, split.ends.name), np.dtype(ENDS_DTYPE)
        ),
        vocab_size=manifest.tokenizer.vocab_size,
        vocab_known=True,
        fingerprint=split.sha256,
        tokenizer=manifest.tokenizer.sha256,
    )


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
                f"make tokens with `python -m jaxllm.tokenize --input {file}`."
            )
    return found if split == "train" else []


def _join_ends(files: list[tuple[np.ndarray, np.ndarray | None]]) -> np.ndarray | None:
    joined, start = [], 0
    for array, ends in files:
        if ends is None:
            return None
        joined.append(ends[ends > 0] + start)
        start += len(array)
    return np.concatenate(joined)


def _sampled_hash(split: TokenSplit) -> str:
    digest = hashlib.sha256(f"sample {split.num_tokens}".encode())
    last = max(split.num_tokens - 4096, 0)
    for start in sorted({last * block // 255 for block in range(256)}):
        stop = min(start + 4096, split.num_tokens)
        digest.update(split.slice(start, stop).astype("<i4").tobytes())
    if split.document_ends is not None:
        digest.update(split.document_ends.astype(ENDS_DTYPE).tobytes())
    return digest.hexdigest()


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

# SPDX-License-Identifier: Apache-2.0
"""Damages files at random: cuts, flips, swaps, nests, removes, relabels them."""

import dataclasses
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Damage:
    """What was done, and to which files, by their paths from the home."""

    text: str
    paths: tuple[Path, ...]

    def touches(self, *parts: str) -> bool:
        """Returns whether any of it is below a folder or file."""
        return any(path.parts[: len(parts)] == parts for path in self.paths)


def damage_one(
    home: Path, places: Sequence[str], weights: Sequence[int], choice: random.Random
) -> Damage:
    """Does one thing to one or two files of a folder.

    Args:
      home: of the folders.
      places: names of folders, of which one is damaged.
      weights: how often each is, beside the others.
      choice: decides all.
    """
    place = home / choice.choices(places, weights)[0]
    files = sorted(p for p in place.rglob("*") if p.is_file() and p.name != ".lock")
    path = choice.choice(files)
    if choice.random() < 0.2:  # a folder
        path = choice.choice(
            [p for p in path.parents if p.is_relative_to(place)][:-1] or [path]
        )
    kinds = _OF_FOLDERS if path.is_dir() else _OF_FILES
    name = choice.choice(sorted(kinds))
    others = [p for p in files if p != path and path not in p.parents]
    touched = kinds[name](path, choice.choice(others), choice)
    paths = tuple(p.relative_to(home) for p in touched)
    return Damage(f"{name} {' '.join(map(str, paths))}", paths)


def _rewrite(path: Path, data: bytes) -> list[Path]:
    path.unlink()  # it may be a hard link
    path.write_bytes(data)
    return [path]


def _flip(path: Path, other: Path, choice: random.Random) -> list[Path]:
    data = bytearray(path.read_bytes())
    if data:
        data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    return _rewrite(path, bytes(data))


def _truncate(path: Path, other: Path, choice: random.Random) -> list[Path]:
    data = path.read_bytes()
    return _rewrite(path, data[: choice.randrange(len(data) + 1)])


def _zero(path: Path, other: Path, choice: random.Random) -> list[Path]:
    data = bytearray(path.read_bytes())
    begin = choice.randrange(len(data) + 1)
    data[begin:] = bytes(len(data) - begin)
    return _rewrite(path, bytes(data))


def _scramble(path: Path, other: Path, choice: random.Random) -> list[Path]:
    return _rewrite(path, choice.randbytes(path.stat().st_size))


def _empty(path: Path, other: Path, choice: random.Random) -> list[Path]:
    return _rewrite(path, b"")


def _nest(path: Path, other: Path, choice: random.Random) -> list[Path]:
    return _rewrite(path, b"[" * 200_000 + b"]" * 200_000 + b"\n")


def _replace_json(path: Path, other: Path, choice: random.Random) -> list[Path]:
    texts = (b"{}", b"[]", b"null", b'"x"', b"1e400", b"-1", b'{"step": NaN}')
    return _rewrite(path, choice.choice(texts))


def _cut_out(path: Path, other: Path, choice: random.Random) -> list[Path]:
    data = path.read_bytes()
    a, b = sorted(choice.randrange(len(data) + 1) for _ in range(2))
    return _rewrite(path, data[:a] + data[b:])


def _swap(path: Path, other: Path, choice: random.Random) -> list[Path]:
    aside = path.with_name(f"{path.name}.x")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)
    return [path, other]


def _copy_over(path: Path, other: Path, choice: random.Random) -> list[Path]:
    return _rewrite(path, other.read_bytes())


def _remove(path: Path, other: Path, choice: random.Random) -> list[Path]:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path]


def _make_folder(path: Path, other: Path, choice: random.Random) -> list[Path]:
    _remove(path, other, choice)
    path.mkdir()
    return [path]


def _make_file(path: Path, other: Path, choice: random.Random) -> list[Path]:
    _remove(path, other, choice)
    path.write_text("{}")
    return [path]


def _make_link(path: Path, other: Path, choice: random.Random) -> list[Path]:
    _remove(path, other, choice)
    path.symlink_to(other)
    return [path]


def _make_pipe(path: Path, other: Path, choice: random.Random) -> list[Path]:
    _remove(path, other, choice)
    os.mkfifo(path)
    return [path]


def _relabel(path: Path, other: Path, choice: random.Random) -> list[Path]:
    """Copies or renames a folder to another name, a number if it has one."""
    label = str(choice.randrange(1, 12)) if path.name.isdigit() else f"{path.name}2"
    target = path.with_name(label)
    touched = [path, target]
    if target.exists() and target != path:
        shutil.rmtree(target)
    if target != path:
        (shutil.copytree if choice.random() < 0.5 else shutil.move)(path, target)
    return touched


_OF_FILES: dict[str, Callable] = {
    "flip": _flip,
    "truncate": _truncate,
    "zero": _zero,
    "scramble": _scramble,
    "empty": _empty,
    "nest": _nest,
    "replace": _replace_json,
    "cut": _cut_out,
    "swap": _swap,
    "copy": _copy_over,
    "remove": _remove,
    "folder": _make_folder,
    "link": _make_link,
    "pipe": _make_pipe,
}
_OF_FOLDERS: dict[str, Callable] = {
    "remove": _remove,
    "folder": _make_folder,
    "file": _make_file,
    "link": _make_link,
    "relabel": _relabel,
}

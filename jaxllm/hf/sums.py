# SPDX-License-Identifier: Apache-2.0
"""SHA256SUMS of an exported folder, as `sha256sum -c` reads it."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from jaxllm.errors import InputError

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_sums(folder: Path, known: Mapping[str, str]) -> None:
    """Writes the hash of each file of a folder.

    Args:
      folder: complete.
      known: hashes by file, of those that need not be read again.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    sums = {name: known.get(name) or _sum(folder / name) for name in names}
    text = "".join(f"{sums[name]}  {name}\n" for name in names if name != SUMS)
    (folder / SUMS).write_text(text, encoding="utf-8")


def check_sums(folder: Path) -> int | None:
    """Returns how many files are what SHA256SUMS says, or None without one.

    Raises:
      InputError: a file has changed or is gone; names each.
    """
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / SUMS} cannot be read: {error}.") from error
    problems = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            problems.append(f"{line[:80]!r} is no hash of a file")
            continue
        wanted, name = match.groups()
        if name.startswith("/") or ".." in Path(name).parts:
            problems.append(f"{name!r} is not a file of this folder")
        elif not (folder / name).is_file():
            problems.append(f"{name} is not there")
        elif _sum(folder / name) != wanted:
            problems.append(f"{name} has changed since")
    if problems:
        shown = "\n  ".join(problems[:8] + ["..."] * (len(problems) > 8))
        raise InputError(
            f"{folder} is not what {SUMS} says, in {len(problems)} cases; get it "
            f"again, or remove {SUMS} if you changed it yourself:\n  {shown}"
        )
    return len(text.splitlines())


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

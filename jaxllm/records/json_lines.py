# SPDX-License-Identifier: Apache-2.0
"""JSON Lines files, to which a run appends whole lines, one write each."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.files import parse_json

Append = Callable[[Mapping[str, Any]], None]


def open_jsonlines(path: Path, opened: contextlib.ExitStack) -> Append:
    """Opens or creates a file; returns a function that appends a line at once.

    Raises:
      OSError: with the file's name, also from what is returned.
    """
    # Unbuffered: a line is one write, and a failed write is not tried again by close.
    file = opened.enter_context(path.open("ab", buffering=0))
    if _is_cut(path):
        file.write(b"\n")

    def append(record: Mapping[str, Any]) -> None:
        data = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            error.filename = str(path)
            raise

    return append


def read_jsonlines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file, without truncated lines of a kill or full disk."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = parse_json(line)
                if isinstance(record, dict):
                    yield record


def _is_cut(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"

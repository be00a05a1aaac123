# SPDX-License-Identifier: Apache-2.0
"""Small files, of which nothing is trusted: their paths, their JSON, their writing.

Standard library only.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError

_MAX_DEPTH = 50


def local_path(name: str, value: str | os.PathLike[str]) -> Path:
    """Returns the path that a flag or setting gives.

    Raises:
      InputError: it is a URL, or no text, and so no name that all of a run can write.
    """
    text = os.fspath(value)
    shown = text.encode("utf-8", "backslashreplace").decode()
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise InputError(
            f"{name}={shown} is a URL, and only paths of mounted file systems can be "
            "used; mount it, as with gcsfuse or s3fs, or copy what is there."
        )
    if shown != text or "\0" in text:
        raise InputError(
            f"{name}={shown!r} is not UTF-8 text, which TensorStore and JSON need; "
            "rename it."
        )
    return Path(text)


def parse_json(text: str | bytes) -> Any:
    """Returns a JSON value; raises ValueError for all that is none of ours."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    inner = [value]
    for _ in range(_MAX_DEPTH):  # what is read is walked by functions that recurse
        inner = [each for outer in inner for each in _children(outer)]
        if not inner:
            return value
    raise ValueError("it is nested too deeply")


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file: either all of it or, on a failure, nothing.

    A link at its place is replaced, and what it points to stays as it is.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()

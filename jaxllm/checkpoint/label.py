# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says of itself in `data/data.json`: its step, its run, its sums.

A folder's name is no proof: `cp -r 8 10` makes a step 10 of step 8.
"""

import dataclasses
import functools
import json
import logging
import re
import secrets
import zlib
from pathlib import Path
from typing import Any

from jaxllm.checkpoint.faults import reading
from jaxllm.errors import CheckpointError, DamagedError, describe_os_error
from jaxllm.files import parse_json, write_whole

RUN_ID = "run_id.txt"  # in a run's directory: which checkpoints are of this run
DATA = "data"  # the entry of `checksums` for all else in the file

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Label:
    """What is saved beside the state.

    Attributes:
      run: id of the run; None in older saves.
      arrays: what each array is, like {"step": "int32[]"}; {} in older saves.
      metrics: of an evaluation of this state; None if there was none.
      data: what the run needs to go on.
      checksums: of each array, and of this file; {} in still older saves.
    """

    step: int
    run: str | None
    arrays: dict[str, str]
    metrics: dict[str, float] | None
    data: dict[str, Any]
    checksums: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the file, with its own checksum."""
        own = {"next_step": self.step, "run": self.run, "arrays": self.arrays}
        content = {**self.data, **own, "metrics": self.metrics}
        sums = {**self.checksums, DATA: json_checksum(content)}
        return {**content, "checksums": sums}


def read_label(folder: Path) -> Label:
    """Returns the label of a step.

    Raises:
      DamagedError: it is not one, or not what was saved.
      CheckpointError: it cannot be read now.
    """
    path = folder / "data" / "data.json"
    with reading(folder):
        stat = path.stat()
        return _read(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=256)
def _read(path: Path, *changed: int) -> Label:
    del changed  # the file is read again when one of them is another
    content, folder = parse_json(path.read_bytes()), path.parents[1]
    sums = content.pop("checksums", {}) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(sums, dict):
        raise DamagedError(f"{folder} is damaged: its data is not a JSON object.")
    whole = not sums or sums.get(DATA) == json_checksum(content)
    if not whole or not all(isinstance(digits, str) for digits in sums.values()):
        raise DamagedError(f"{folder} is damaged: its data is not what was saved.")
    step = content.pop("next_step", None)
    if type(step) is not int or ("arrays" in content and not sums):
        raise DamagedError(f"{folder} is damaged: its data lacks what every save has.")
    return Label(
        step=step,
        run=content.pop("run", None),
        arrays=content.pop("arrays", {}),
        metrics=content.pop("metrics", None),
        data=content,
        checksums=sums,
    )


def json_checksum(value: Any) -> str:
    """Returns 8 hexadecimal digits of a JSON value, whatever the order of its keys."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def read_run_id(workdir: Path) -> str | None:
    """Returns the id of the run in a directory, or None: it has none yet."""
    path = workdir / RUN_ID
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        text = path.read_bytes().decode("ascii", "replace").strip()
    except OSError as error:
        why = describe_os_error(error.errno, error.strerror)
        raise CheckpointError(f"{path} cannot be read: {why}.") from error
    return text if re.fullmatch("[0-9a-f]{16}", text) else None


def give_run_id(workdir: Path, newest: Path | None) -> None:
    """Gives the run in a directory an id, unless it has one.

    Args:
      workdir: of the run.
      newest: its newest step, whose id it then is: the file may have been removed.
    """
    if read_run_id(workdir) is None:
        run = read_label(newest).run if newest else None
        write_whole(workdir / RUN_ID, (run or secrets.token_hex(8)).encode())

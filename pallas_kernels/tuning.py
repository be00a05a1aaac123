# SPDX-License-Identifier: Apache-2.0
"""Tiles that were timed on a device, looked up by what a call looks like.

`devices/<kind>.json` maps a kernel to entries of "when" (all must be equal to the
call's), "tile", "microseconds" and "cases" (what was timed) and "date". The first that
fits wins, so special entries stand above general ones. `python -m pallas_kernels.bench
--tune` writes them; nothing is searched at run time.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels.target import Target

DEVICES = Path(__file__).parent / "devices"


def look_up(target: Target, kernel: str, call: Mapping[str, Any]) -> dict[str, int]:
    """Returns the fields of the tile on record for a call; {} if none is.

    Args:
      kernel: such as "attention_forward".
      call: what entries may ask for, such as {"head_dim": 128, "causal": True}.
    """
    for entry in table(target.kind).get(kernel, ()):
        if all(call.get(name) == value for name, value in entry["when"].items()):
            return entry["tile"]
    return {}


@functools.cache
def table(kind: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the entries of each kernel for a kind of device; {} if none was timed."""
    path = DEVICES / f"{kind.lower().replace(' ', '_')}.json"
    return json.loads(path.read_text()) if path.exists() else {}

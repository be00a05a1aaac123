# SPDX-License-Identifier: Apache-2.0
"""Memory that there is: of this machine, of a container in it, of a device."""

import os
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError

_CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own
_NAMES = ("kB", "MB", "GB", "TB", "PB")


def host_bytes(proc: Path = Path("/proc"), cgroup: Path = _CGROUP) -> int:
    """Returns the bytes that this process can still take without swapping.

    The least of what the kernel calls available and what the container may still use.
    Pages of files that a container has not used for long count as free.
    """
    found = [_available(proc)]
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and used is not None:
        found.append(limit - used + _inactive_file(cgroup))
    return max(0, min(found))


def device_bytes(device: Any) -> int | None:
    """Returns the bytes of a device for arrays; None if it shares the host's memory."""
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None


def check_room(what: str, needed: int, there: int | None, remedy: str) -> None:
    """Refuses what needs more memory than there is.

    Args:
      what: the setting and its value, and what it makes.
      needed: bytes.
      there: bytes; None is unknown and passes.
      remedy: what to do instead, without a full stop.

    Raises:
      InputError: with both numbers.
    """
    if there is not None and needed > there:
        raise InputError(
            f"{what} needs {show_bytes(needed)} of memory, and there are "
            f"{show_bytes(there)} for that; {remedy}."
        )


def show_bytes(count: int) -> str:
    """Returns bytes as a person reads them, such as 3.2 GB."""
    power = min(len(_NAMES), max(1, (len(str(count)) - 1) // 3))
    return f"{count / 1000**power:.3g} {_NAMES[power - 1]}"


def _available(proc: Path) -> int:
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(path: Path) -> int | None:
    """Returns the number in a file; None if there is no file, or it says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _inactive_file(cgroup: Path) -> int:
    try:
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split() for line in lines)
    return int(values.get("inactive_file", 0))

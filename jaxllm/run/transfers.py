# SPDX-License-Identifier: Apache-2.0
"""A transfer guard over all threads: `jax.transfer_guard` holds for one thread only."""

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import jax

# Not device to host: Orbax's threads copy the arrays of a checkpoint so.
_GUARDS = ("jax_transfer_guard_host_to_device", "jax_transfer_guard_device_to_device")
_REFUSED: dict[str, str | None] = dict.fromkeys(_GUARDS, "disallow")


class ExplicitTransfers:
    """Refuses implicit transfers in all threads, the data's too, until it is closed."""

    def __init__(self):
        self._before = _global_guards()

    def __enter__(self) -> Self:
        _set_guards(_REFUSED)
        return self

    def __exit__(self, *error) -> None:
        _set_guards(self._before)

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Restores the settings of before, for code that is not the loop's."""
        _set_guards(self._before)
        try:
            yield
        finally:
            _set_guards(_REFUSED)


def _global_guards() -> dict[str, str | None]:
    # A new thread has no settings of its own, which would hide the global ones.
    with ThreadPoolExecutor(1) as thread:
        values = thread.map(lambda name: getattr(jax.config, name), _GUARDS)
        return dict(zip(_GUARDS, values, strict=True))


def _set_guards(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)

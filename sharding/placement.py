# SPDX-License-Identifier: Apache-2.0
"""Global arrays from the rows that each host reads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which rows of a global batch this process reads, and where it puts them.

    They follow from the batch's sharding, never from the index of the process: two
    processes hold the same rows as soon as another mesh axis spans them.
    """

    shape: tuple[int, int]  # of the global batch, BT
    sharding: jax.sharding.NamedSharding | None
    parts: dict[Any, tuple[slice, ...]]  # of it, by device of this process
    rows: np.ndarray  # the rows in them, ascending

    @classmethod
    def of(
        cls, shape: tuple[int, int], sharding: jax.sharding.NamedSharding | None
    ) -> "Placement":
        """Returns the placement of a batch; without a sharding, on one device."""
        every_row = np.arange(shape[0])
        if sharding is None:
            return cls(shape, None, {}, every_row)
        index_map = sharding.addressable_devices_indices_map(shape)
        parts = {device: part for device, part in index_map.items() if part is not None}
        held = [every_row[part[0]] for part in parts.values()]
        return cls(shape, sharding, parts, np.unique(np.concatenate(held)))

    def place(self, held: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Starts the transfer of this process's `rows`; returns global arrays."""
        if self.sharding is None:
            return jax.device_put(dict(held))
        # One explicit transfer of everything: to a transfer guard,
        # make_array_from_callback is an implicit one.
        devices = list(self.parts)
        placed = jax.device_put(
            [self.part(held[name], device) for name in held for device in devices],
            devices * len(held),
        )
        return {
            name: jax.make_array_from_single_device_arrays(
                self.shape,
                self.sharding,
                placed[i * len(devices) : (i + 1) * len(devices)],
            )
            for i, name in enumerate(held)
        }

    def part(self, values: np.ndarray, device: Any) -> np.ndarray:
        """Returns a device's part of what this process holds."""
        rows, columns = self.parts[device]
        start, stop, _ = rows.indices(self.shape[0])
        first = int(np.searchsorted(self.rows, start))
        return values[first : first + stop - start, columns]

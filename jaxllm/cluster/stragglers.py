# SPDX-License-Identifier: Apache-2.0
"""Finds stragglers: processes that the others wait for.

All processes take the same time for a step, since each waits for the slowest. They
differ in the host time before a step is dispatched to the devices: waiting for data,
writing, other work of the host. At each logged interval they exchange its median.
"""

import collections
import logging
import statistics
from typing import Self

import jax
import numpy as np

SLOW_PART = 0.1  # share of a step by which a straggler is later than the median process
PATIENCE = 3  # logged intervals in a row, before a straggler is named
_log = logging.getLogger(__name__)


class Stragglers:
    """Collects the host seconds per step of each process; free for a single process.

    The medians of one interval are exchanged while the next one runs: nobody waits.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._alone = jax.process_count() == 1
        self._own_s: list[float] = []  # of the current interval
        self._pending: jax.Array | None = None
        self._medians_s: list[list[float]] = []  # by interval, then by process
        self._late_for = collections.Counter[int]()  # intervals in a row, by process
        if self._alone:
            return
        self._mesh = mesh
        self._cut = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        everywhere = jax.NamedSharding(mesh, jax.P())
        with jax.set_mesh(mesh):
            share = jax.jit(lambda own_s: own_s, out_shardings=everywhere)
            self._share = share.lower(self._place(0.0)).compile()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        if text := self.table():
            _log.info("%s", text)

    def add(self, own_s: float) -> None:
        """Records the seconds that this process needed before a step could begin."""
        self._own_s.append(own_s)

    def exchange(self, step_s: float) -> None:
        """Ends an interval: starts to exchange its median, judges the previous one.

        Args:
          step_s: seconds per step.
        """
        if self._alone or not self._own_s:
            return
        before, self._pending = (
            self._pending,
            self._share(self._place(statistics.median(self._own_s))),
        )
        self._own_s = []
        if before is not None:
            self.judge(self._by_process(before), step_s)

    def judge(self, medians_s: list[float], step_s: float) -> None:
        """Takes the medians of all processes; warns of a persistent straggler."""
        self._medians_s.append(medians_s)
        usual_s = statistics.median_low(medians_s)
        for process, own_s in enumerate(medians_s):
            is_late = own_s - usual_s > SLOW_PART * step_s
            self._late_for[process] = self._late_for[process] + 1 if is_late else 0
            if self._late_for[process] == PATIENCE and jax.process_index() == 0:
                _log.warning(
                    "process %d is late: before each step it takes %.3g s, and the "
                    "median process %.3g s, of %.3g s a step; all others wait for it.",
                    process,
                    own_s,
                    usual_s,
                    step_s,
                )

    def table(self) -> str:
        """Returns the host seconds per step by process, latest first; "" if alone."""
        if not self._medians_s:
            return ""
        by_process = zip(*self._medians_s, strict=True)
        own_s = {n: statistics.median(s) for n, s in enumerate(by_process)}
        latest = sorted(own_s, key=lambda n: -own_s[n])
        rows = [f"  process {n:<5} {own_s[n]:>10.4f} s" for n in latest]
        return "\n".join(["before each step, of its own:", *rows])

    def _place(self, own_s: float) -> jax.Array:
        devices = list(self._cut.addressable_devices)
        part = np.array([own_s], np.float32)
        parts = jax.device_put([part] * len(devices), devices)
        return jax.make_array_from_single_device_arrays(
            (self._mesh.size,), self._cut, parts
        )

    def _by_process(self, shared: jax.Array) -> list[float]:
        values = jax.device_get(shared).tolist()
        processes = [device.process_index for device in self._mesh.devices.flat]
        found = dict(zip(processes, values, strict=True))
        return [found[process] for process in sorted(found)]

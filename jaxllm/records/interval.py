# SPDX-License-Identifier: Apache-2.0
"""The steps between two log records: their metrics, read late, and their times."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxllm.records.metrics import Record, device_memory_bytes

MFU = Callable[[float], float | None]  # tokens a second -> model FLOPs utilisation
_LAST = ("loss", "objective", "grad_norm", "lr", "num_targets")  # of the last step
_ROUTER = "router_"


class LateMetrics:
    """Holds a step's metrics until the next one runs, so that reading does not wait."""

    def __init__(self):
        self._waiting: tuple[int, Any, float, dict[str, float]] | None = None
        self._read_at_s = -math.inf

    def push(
        self, step: int, metrics: Any, *, began_at_s: float, **host: float
    ) -> Record | None:
        """Takes the metrics of the step just started; returns those of the one before.

        Args:
          step: the step just started.
          metrics: dict of arrays on the device.
          began_at_s: `time.perf_counter()` before the batch of this step was asked for.
          host: further numbers of this step.

        Returns:
          `step`, the metrics (scalars as float, others as np.ndarray), `host` and
          `step_s`: from the read before, or the beginning if that was later. None if
          nothing was waiting.
        """
        before = self.flush()
        self._waiting = (step, metrics, began_at_s, host)
        return before

    def flush(self) -> Record | None:
        """Waits for the step pushed last, and returns its metrics as `push` does.

        Call it before an evaluation or a checkpoint: their time is then not in
        `step_s`, and no metrics are lost if the run dies after the checkpoint.
        """
        if self._waiting is None:
            return None
        (step, metrics, began_at_s, host), self._waiting = self._waiting, None
        arrays = jax.device_get(metrics)  # explicit: the transfer guard allows it
        now_s = time.perf_counter()
        step_s = now_s - max(began_at_s, self._read_at_s)
        self._read_at_s = now_s
        values = {k: v if v.ndim else float(v) for k, v in arrays.items()}
        return {"step": step, **values, **host, "step_s": step_s}


class Interval:
    """The steps since the last log record.

    Its tokens a second are those with a target: padding is no work that is useful.

    Args:
      mfu: for the devices and the model of the run.
    """

    def __init__(self, mfu: MFU):
        self._mfu = mfu
        self._late = LateMetrics()
        self._steps: list[Record] = []
        self._began_at_s = self._read_at_s = time.perf_counter()
        self._data_wait_s = 0.0

    @property
    def first_step(self) -> int:
        """The first of its steps whose metrics are read."""
        return self._steps[0]["step"]

    @property
    def own_s(self) -> float:
        """Seconds that this process has needed since it last waited for the devices."""
        return time.perf_counter() - self._read_at_s

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Begins a step: times the wait for its batch."""
        self._began_at_s = time.perf_counter()
        yield
        self._data_wait_s = time.perf_counter() - self._began_at_s

    def push(self, step: int, metrics: Any) -> Record | None:
        """Takes the metrics of the step just started; returns those of the one before.

        Both as `LateMetrics.push`.
        """
        before = self._late.push(
            step, metrics, began_at_s=self._began_at_s, data_wait_s=self._data_wait_s
        )
        self._read_at_s = time.perf_counter()
        return before

    def flush(self) -> Record | None:
        """Waits for the step pushed last, and returns its metrics."""
        return self._late.flush()

    def add(self, values: Record) -> None:
        """Takes the metrics of one more step, as `push` and `flush` return them."""
        self._steps.append(values)

    def end(self, counts: Mapping[str, float], goodput: float) -> dict[str, float]:
        """Returns the scalars of a log record; the next interval begins.

        Args:
          counts: of the anomalies.
          goodput: of the run until now.
        """
        steps, self._steps = self._steps, []
        last = steps[-1]
        step_s = math.fsum(values["step_s"] for values in steps) / len(steps)
        wait_s = math.fsum(values["data_wait_s"] for values in steps) / len(steps)
        tokens = math.fsum(values["num_targets"] for values in steps) / len(steps)
        mfu = self._mfu(tokens / step_s)
        memory_bytes = device_memory_bytes()
        return {
            **{name: last[name] for name in _LAST},
            **{name: v for name, v in last.items() if name.startswith(_ROUTER)},
            **counts,
            "tokens_per_s": tokens / step_s,
            "mfu": math.nan if mfu is None else mfu,  # null in metrics.jsonl
            "step_s": step_s,
            "data_wait_s": wait_s,
            "goodput": goodput,
            **({} if memory_bytes is None else {"memory_bytes": memory_bytes}),
        }

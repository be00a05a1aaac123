# SPDX-License-Identifier: Apache-2.0
"""Steps whose loss or gradient is not finite, or far above the usual, and what follows.

Everything here is a function of the numbers of the steps so far, in their order, and is
saved with the state: a resumed run judges as one that was never stopped.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxllm.config import AnomalyConfig

WINDOW = 128  # steps that make the median
MIN_STEPS = 16  # and that there must be, before anything is far above it
BUDGET_STEPS = 1000  # in which config.anomaly.budget counts
NAMES = {"objective": "loss", "grad_norm": "gradient norm"}  # what is judged

Bounds = tuple[float, ...]  # in the order of NAMES


class Rewind(Exception):
    """The run goes back to a save, and leaves the batch of a step out."""


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """A step that is not as it should be, and what is to be done about it."""

    step: int
    batch: int  # its number in the data
    what: str
    action: Literal["stop", "skip", "rewind"]

    def __str__(self) -> str:
        done = {
            "stop": "the run stops",
            "skip": "its update has no effect",
            "rewind": f"the run goes back, and leaves batch {self.batch} out",
        }
        return f"{self.what}; {done[self.action]}. {self.advice}"

    @property
    def advice(self) -> str:
        """Says how to look at it."""
        return (
            f"`python -m jaxllm.replay --step {self.step} --batch {self.batch}` with "
            "the same --workdir shows its rows and layers."
        )


class Anomalies:
    """Judges step after step.

    Attributes:
      left_out: numbers of the batches that are never used, ascending.
    """

    def __init__(self, config: AnomalyConfig, leaf_paths: Sequence[str]):
        self._config = config
        self._leaf_paths = leaf_paths
        self._sound: list[list[float]] = []  # step and values of each that was not one
        self._skipped: list[int] = []  # steps
        self._left_out: list[list[int]] = []  # step and batch

    @property
    def left_out(self) -> list[int]:
        return sorted(batch for _, batch in self._left_out)

    def to_json(self) -> dict[str, Any]:
        """Returns what is to be saved with the state of the steps judged so far."""
        return {
            "sound": self._sound,
            "skipped": self._skipped,
            "left_out": self._left_out,
        }

    def go_to(self, saved: Mapping[str, Any]) -> None:
        """Forgets the steps that a save does not know, but no batch that is left out.

        Args:
          saved: what `to_json` gave; {} is the beginning of a run.
        """
        self._sound = list(saved["sound"]) if saved else []
        self._skipped = list(saved["skipped"]) if saved else []
        known = saved["left_out"] if saved else []
        self._left_out += [each for each in known if each not in self._left_out]

    def bounds(self, step: int) -> Bounds:
        """Returns what the values of a step must not exceed, as float32.

        They follow from the steps up to the one before the last, since the last one's
        numbers are not known yet when this one is given to the devices.
        """
        known = [values for at, *values in self._sound if at <= step - 2][-WINDOW:]
        factor = self._config.spike_factor
        if factor is None or len(known) < MIN_STEPS:
            return (math.inf,) * len(NAMES)
        medians = map(statistics.median, zip(*known, strict=True))
        return tuple(float(np.float32(factor * median)) for median in medians)

    def judge(self, values: Mapping[str, Any], batch: int) -> Anomaly | None:
        """Takes the metrics of the next step; returns what is wrong with it, if so.

        Args:
          values: of the step, and its number, `step`.
          batch: the number of its batch.
        """
        step = values["step"]
        judged = {name: values[name] for name in NAMES}
        faults = list(self._faults(values, self.bounds(step)))
        if not faults:
            self._sound = [*self._sound, [step, *judged.values()]][-WINDOW - 1 :]
            return None
        action, what = self._config.policy, f"step {step}: {'; '.join(faults)}"
        recent = [at for at in self._all_steps() if at > step - BUDGET_STEPS]
        if action != "stop" and len(recent) >= self._config.budget:
            action = "stop"
            what += (
                f". config.anomaly.budget={self._config.budget} is spent, by the "
                f"steps {recent}"
            )
        if action == "skip":
            self._skipped.append(step)
        elif action == "rewind":
            self._left_out.append([step, batch])
        return Anomaly(step, batch, what, action)

    def metrics(self, since: int) -> dict[str, float]:
        """Returns how much was left out: from a step on, and since the run began."""
        match self._config.policy:
            case "skip":
                recent = sum(step >= since for step in self._skipped)
                return {"skipped": recent, "skipped_total": len(self._skipped)}
            case "rewind":
                return {"left_out_total": len(self._left_out)}
            case "stop":
                return {}

    def _all_steps(self) -> list[int]:
        return [*self._skipped, *(step for step, _ in self._left_out)]

    def _faults(self, values: Mapping[str, Any], bounds: Bounds) -> Iterator[str]:
        if not all(math.isfinite(values[name]) for name in NAMES):
            norms = dict(zip(self._leaf_paths, values["leaf_norms"], strict=True))
            bad = [path for path, norm in norms.items() if not math.isfinite(norm)]
            yield (
                f"the loss is {values['loss']}, and the gradient is not finite in "
                f"{len(bad)} of {len(norms)} parameters, first in "
                f"{bad[0] if bad else 'none'}"
            )
            return
        for (name, noun), bound in zip(NAMES.items(), bounds, strict=True):
            if values[name] > bound:
                factor = self._config.spike_factor
                yield (
                    f"the {noun} {values[name]:.6g} is above {bound:.6g}, which is "
                    f"config.anomaly.spike_factor={factor} times the median"
                )

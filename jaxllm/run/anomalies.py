# SPDX-License-Identifier: Apache-2.0
"""Anomalies: steps with a non-finite loss or gradient, or a spike, and the policy.

Everything here is a function of the metrics of the steps so far, in their order, and is
saved with the state: a resumed run judges as an uninterrupted one.
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
    """The run restores a checkpoint, and leaves out the batch of a step."""


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """An anomalous step, and the action that the policy asks for."""

    step: int
    batch: int  # its number in the data
    what: str
    action: Literal["stop", "skip", "rewind"]

    def __str__(self) -> str:
        done = {
            "stop": "the run stops",
            "skip": "its update is skipped",
            "rewind": f"the run rewinds, and leaves batch {self.batch} out",
        }
        return f"{self.what}; {done[self.action]}. {self.advice}"

    @property
    def advice(self) -> str:
        """The command that replays the step."""
        return (
            f"`python -m jaxllm.replay --workdir RUN --step {self.step} --batch "
            f"{self.batch}`, where RUN is this run's directory, shows its rows and "
            "layers."
        )


class Anomalies:
    """Judges the metrics of each step.

    Attributes:
      left_out: numbers of the batches that are left out, ascending.
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
        """Returns the steps judged so far, to be saved with the state."""
        return {
            "sound": self._sound,
            "skipped": self._skipped,
            "left_out": self._left_out,
        }

    def go_to(self, saved: Mapping[str, Any]) -> None:
        """Restores the steps of a checkpoint, and keeps the batches left out since.

        Args:
          saved: from `to_json`; {} before any step.
        """
        self._sound = list(saved["sound"]) if saved else []
        self._skipped = list(saved["skipped"]) if saved else []
        known = saved["left_out"] if saved else []
        self._left_out += [each for each in known if each not in self._left_out]

    def bounds(self, step: int) -> Bounds:
        """Returns the largest values of a step that are no spike, as float32.

        By the steps up to the one before the last: metrics are read one step late, so
        those of the last are unknown when this step starts.
        """
        known = [values for at, *values in self._sound if at <= step - 2][-WINDOW:]
        factor = self._config.spike_factor
        if factor is None or len(known) < MIN_STEPS:
            return (math.inf,) * len(NAMES)
        medians = map(statistics.median, zip(*known, strict=True))
        return tuple(float(np.float32(factor * median)) for median in medians)

    def judge(self, values: Mapping[str, Any], batch: int) -> Anomaly | None:
        """Takes the metrics of the next step; returns its anomaly, if it is one.

        Args:
          values: metrics of the step, and its number, `step`.
          batch: the number of its batch.
        """
        step = values["step"]
        judged = {name: values[name] for name in NAMES}
        if not values["num_targets"]:  # there is no loss, and no gradient of one
            judged["objective"] = 0.0
        faults = list(self._faults(values, judged, self.bounds(step)))
        if not faults:
            if values["num_targets"]:
                sound = [*self._sound, [step, *judged.values()]]
                self._sound = sound[-WINDOW - 1 :]
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
        """Returns the number of steps skipped, since a step and in all, or left out."""
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

    def _faults(
        self, values: Mapping[str, Any], judged: Mapping[str, float], bounds: Bounds
    ) -> Iterator[str]:
        if not all(map(math.isfinite, judged.values())):
            norms = dict(zip(self._leaf_paths, values["leaf_norms"], strict=True))
            bad = [path for path, norm in norms.items() if not math.isfinite(norm)]
            yield (
                f"the loss is {values['loss']}, and the gradient is not finite in "
                f"{len(bad)} of {len(norms)} parameters, first in "
                f"{bad[0] if bad else 'none'}"
            )
            return
        for (name, noun), bound in zip(NAMES.items(), bounds, strict=True):
            if judged[name] > bound:
                factor = self._config.spike_factor
                yield (
                    f"the {noun} {judged[name]:.6g} is above {bound:.6g}, which is "
                    f"config.anomaly.spike_factor={factor} times the median"
                )

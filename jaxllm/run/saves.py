# SPDX-License-Identifier: Apache-2.0
"""Where a run stands, as it is saved and gone on from: never with a bad number."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxllm.checkpoint import Checkpoints
from jaxllm.data.splits import describe_change
from jaxllm.errors import InputError
from jaxllm.step import Setup, TrainState, init_state

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Position:
    """A state, and what of the host's decides how it goes on."""

    step: int  # updates done
    state: TrainState
    anomalies: dict[str, Any]  # of `Anomalies.to_json`; {} before any step


@dataclasses.dataclass(frozen=True)
class Positions:
    """The positions of a run that are saved, and its beginning."""

    setup: Setup
    checkpoints: Checkpoints
    data: dict[str, Any]  # what makes the batches, saved with each

    def newest(self) -> Position:
        """Returns the newest intact save, or the beginning if nothing is saved.

        Raises:
          InputError: the save has other batches than this run would have.
          CheckpointError: there are saves, and none can be read.
        """
        self.checkpoints.wait()
        if not self.checkpoints.steps():
            return Position(0, init_state(self.setup), {})
        began_at_s = time.perf_counter()
        step, state, saved = self.checkpoints.restore_newest(self.setup.abstract_state)
        position = self._read(step, state, saved)
        seconds = time.perf_counter() - began_at_s
        _log.info("resuming from step %d (read in %.1f s)", step, seconds)
        return position

    def up_to(self, step: int) -> Position:
        """Returns the newest save of at most a step, or the beginning."""
        steps = [saved for saved in self.checkpoints.steps() if saved <= step]
        if not steps:
            return Position(0, init_state(self.setup), {})
        abstract = self.setup.abstract_state
        return self._read(steps[-1], *self.checkpoints.restore(steps[-1], abstract))

    def left_out(self) -> list[int]:
        """Returns which batches no step of the run has, as its newest save says."""
        steps = self.checkpoints.steps()
        saved = self.checkpoints.data(steps[-1]) if steps else {}
        pairs = saved["anomalies"]["left_out"] if "anomalies" in saved else []
        return sorted(batch for _, batch in pairs)

    def _read(self, step: int, state: TrainState, saved: Mapping[str, Any]) -> Position:
        if change := describe_change(saved["batches"], self.data):
            raise InputError(change)
        anomalies = saved["anomalies"] if "anomalies" in saved else {}
        return Position(step, state, anomalies)

    def save(
        self,
        position: Position,
        check: jax.stages.Compiled,
        *,
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Starts to save a position.

        Raises:
          FloatingPointError: its state is not finite; it is not saved.
        """
        self._check_finite(position, check)
        data = {
            "next_step": position.step,
            "batches": self.data,
            "anomalies": position.anomalies,
        }
        self.checkpoints.save(position.step, position.state, data, metrics=metrics)

    def stopped(self, why: str, advice: str = "") -> FloatingPointError:
        """Returns the error of a run that must not go on from where it is."""
        saved = self.checkpoints.latest()
        return FloatingPointError(
            f"{why}. That update is not saved; the newest save is "
            f"{'none' if saved is None else f'step {saved}'}. Lower "
            "config.optimizer.lr or config.optimizer.clip_norm, then run the same "
            f"command again. {advice}".rstrip()
        )

    def _check_finite(self, position: Position, check: jax.stages.Compiled) -> None:
        finite = jax.device_get(check(position.state)).tolist()
        leaves = jax.tree.leaves_with_path(self.setup.abstract_state)
        bad = [path for (path, _), ok in zip(leaves, finite, strict=True) if not ok]
        if bad:
            name = jax.tree_util.keystr(bad[0], simple=True, separator="/")
            raise self.stopped(
                f"step {position.step - 1}: its loss and gradient are finite, but "
                f"{len(bad)} of {len(leaves)} arrays after its update are not, first "
                f"{name}"
            )

# SPDX-License-Identifier: Apache-2.0
"""Saves and restores the state of a run; a non-finite state is never saved."""

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxllm.checkpoint import Checkpoints
from jaxllm.config.files import config_to_dict
from jaxllm.config.saved import compare_configs
from jaxllm.data.fingerprint import describe_change
from jaxllm.errors import CheckpointError, InputError
from jaxllm.hf.importing import IMPORTED
from jaxllm.run.origin import first_state
from jaxllm.step import Setup, TrainState

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Saved:
    """All that a run is resumed from."""

    step: int  # updates done
    state: TrainState
    anomalies: dict[str, Any]  # of `Anomalies.to_json`; {} before any step


@dataclasses.dataclass(frozen=True)
class Saves:
    """Saves and restores the state of a run; a non-finite state is never saved."""

    setup: Setup
    checkpoints: Checkpoints
    data: dict[str, Any]  # fingerprint of the training data, in each checkpoint
    eval_data: str | None  # of the held-out data: losses on others are not compared

    def newest(self) -> Saved:
        """Returns the newest intact checkpoint, or the initial state without any.

        Raises:
          InputError: the checkpoint has other batches than this run would have.
          CheckpointError: there are checkpoints, and none can be read.
        """
        self.checkpoints.wait()
        if self.checkpoints.is_empty():
            return Saved(0, first_state(self.setup), {})
        latest = self.checkpoints.latest()
        if latest is not None and IMPORTED in self.checkpoints.data(latest):
            raise InputError(
                "--workdir holds an imported model, not a run; give it as "
                "config.init_from, and another --workdir."
            )
        began_at_s = time.perf_counter()
        step, state, saved = self.checkpoints.restore_newest(self.setup.abstract_state)
        found = self._read(step, state, saved)
        seconds = time.perf_counter() - began_at_s
        _log.info("resuming from step %d (read in %.1f s)", step, seconds)
        return found

    def up_to(self, step: int) -> Saved:
        """Returns the newest checkpoint of at most a step, or the initial state."""
        steps = [saved for saved in self.checkpoints.steps() if saved <= step]
        if not steps:
            return Saved(0, first_state(self.setup), {})
        abstract = self.setup.abstract_state
        return self._read(steps[-1], *self.checkpoints.restore(steps[-1], abstract))

    def left_out(self) -> list[int]:
        """Returns the batches that the newest checkpoint says are left out."""
        steps = self.checkpoints.steps()
        saved = self.checkpoints.data(steps[-1]) if steps else {}
        pairs = saved["anomalies"]["left_out"] if "anomalies" in saved else []
        return sorted(batch for _, batch in pairs)

    def _read(self, step: int, state: TrainState, saved: Mapping[str, Any]) -> Saved:
        if "batches" not in saved:
            raise CheckpointError(f"step {step} does not say which batches come next.")
        if change := describe_change(saved["batches"], self.data):
            raise InputError(change)
        if change := describe_other_model(saved, config_to_dict(self.setup.config)):
            raise InputError(
                f"step {step} was saved by a run with another model or seed: {change}. "
                "Go back to those settings, or give another --workdir."
            )
        anomalies = saved["anomalies"] if "anomalies" in saved else {}
        return Saved(step, state, anomalies)

    def save(
        self,
        saved: Saved,
        check: jax.stages.Compiled,
        *,
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Starts to write a checkpoint.

        Args:
          saved: what to write.
          check: from `compile_check`.
          metrics: of an evaluation of this state, if there was one.

        Raises:
          FloatingPointError: the state is not finite; nothing is written.
        """
        self._check_finite(saved, check)
        config = config_to_dict(self.setup.config)
        data = {
            "batches": self.data,
            "eval": self.eval_data,
            "anomalies": saved.anomalies,
            "config": {name: config[name] for name in ("seed", "model")},
        }
        self.checkpoints.save(saved.step, saved.state, data, metrics=metrics)

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Returns whether an evaluation is better than that of every checkpoint."""
        self.checkpoints.wait()  # the one under way counts
        best = self.checkpoints.best(self.eval_data)
        known = math.inf if best is None else self.checkpoints.eval_loss(best)
        assert known is not None, "`best` has a loss"
        return metrics["eval_loss"] < known

    def stop_error(self, why: str, advice: str = "") -> FloatingPointError:
        """Returns the error of a run whose newest state must not be saved."""
        saved = self.checkpoints.latest()
        return FloatingPointError(
            f"{why}. That update is not saved; the newest save is "
            f"{'none' if saved is None else f'step {saved}'}. Lower "
            "config.optimizer.lr or config.optimizer.clip_norm, then run the same "
            f"command again. {advice}".rstrip()
        )

    def _check_finite(self, saved: Saved, check: jax.stages.Compiled) -> None:
        finite = jax.device_get(check(saved.state)).tolist()
        leaves = jax.tree.leaves_with_path(self.setup.abstract_state)
        bad = [path for (path, _), ok in zip(leaves, finite, strict=True) if not ok]
        if bad:
            name = jax.tree_util.keystr(bad[0], simple=True, separator="/")
            raise self.stop_error(
                f"step {saved.step - 1}: its loss and gradient are finite, but "
                f"{len(bad)} of {len(leaves)} arrays after its update are not, first "
                f"{name}"
            )


def describe_other_model(saved: Mapping[str, Any], config: dict[str, Any]) -> str:
    """Returns how a config differs in seed and model from that of a checkpoint.

    Args:
      saved: the data of the checkpoint; older ones do not have it.
      config: as JSON.
    """
    if "config" not in saved:
        return ""
    return "; ".join(compare_configs(saved["config"], config)[0])

# SPDX-License-Identifier: Apache-2.0
"""Saves and restores the training state and the data position, both or neither.

`<folder>/<step>/` holds `state/` (arrays) and `data/` (JSON); it appears at once, when
all of it is written. `data/` has the checksums of both, which every read compares.
"""

import contextlib
import copy
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxllm.checkpoint.checksum import checksums
from jaxllm.checkpoint.faults import reading, reason
from jaxllm.checkpoint.label import Label, read_label, read_run_id
from jaxllm.checkpoint.leftovers import end_leftovers
from jaxllm.checkpoint.reading import describe, orbax_context, read_params, read_step
from jaxllm.checkpoint.steps import find_steps, set_aside
from jaxllm.cluster.agreement import of_lead
from jaxllm.config import CheckpointConfig
from jaxllm.errors import (
    CheckpointError,
    DamagedError,
    InputError,
    describe_os_error,
)
from jaxllm.files import parse_json

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in one folder. Only `save` changes the folder."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self._folder = Path(folder).absolute()
        self._config = config
        self._home = _inode(self._folder.parent)  # None: not made yet
        self._writer: ocp.training.Checkpointer | None = None  # made by the first save
        self._pending: tuple[int, ocp.AsyncResponse[bool]] | None = None
        self._warned: set[Path] = set()
        self._damaged: set[int] = set()  # steps that were read, and not as saved
        # By saved step: the loss of an evaluation, if any, and of which held-out data.
        self._losses: dict[int, tuple[float | None, str | None]] = {}
        logging.getLogger("absl").addFilter(_is_worth_reading)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            _log.error("%s", failure)  # and let the first error through

    def steps(self) -> list[int]:
        """Returns the complete steps, ascending; warns once of each other folder."""
        steps, faults = find_steps(self._folder)
        for path in faults.keys() - self._warned:
            _log.warning("%s %s; it is ignored.", path, faults[path].text)
        self._warned |= faults.keys()
        return [step for step in steps if step not in self._damaged]

    def is_empty(self) -> bool:
        """Returns whether nothing was ever saved, whole or damaged since."""
        faults = find_steps(self._folder)[1].values()
        damaged = any(fault.kind != "unfinished" for fault in faults)
        return not (damaged or self._damaged or self.steps())

    def latest(self) -> int | None:
        """Returns the newest complete step."""
        return max(self.steps(), default=None)

    def best(self, held_out: str | None = None) -> int | None:
        """Returns the complete step of the lowest finite eval loss, if any has one.

        Args:
          held_out: fingerprint of the held-out data whose losses count; None is that of
            the newest step that was evaluated. Losses of other data are not comparable.
        """
        return self._best(self.steps(), held_out)

    def eval_loss(self, step: int) -> float | None:
        """Returns the loss that was measured of a step, if it was evaluated."""
        return self._evaluation(step)[0]

    def _evaluation(self, step: int) -> tuple[float | None, str | None]:
        if step not in self._losses:
            folder = self._folder / str(step)
            label = read_label(folder)
            metrics = label.metrics or _metrics_of_old(folder) or {}
            self._losses[step] = metrics.get("eval_loss"), label.data.get("eval")
        return self._losses[step]

    def _best(self, steps: Sequence[int], held_out: str | None = None) -> int | None:
        found = {step: self._evaluation(step) for step in steps}
        evaluated = {s: loss for s, (loss, _) in found.items() if loss is not None}
        if not evaluated:
            return None
        wanted = held_out or found[max(evaluated)][1]
        finite = {
            step: loss
            for step, loss in evaluated.items()
            if math.isfinite(loss) and found[step][1] == wanted
        }
        # Of equal losses the newest.
        return min(finite, key=lambda step: (finite[step], -step), default=None)

    def named(self, which: int | Literal["latest", "best"]) -> int:
        """Returns the complete step that is meant; InputError if there is none."""
        found = {"latest": self.latest, "best": self.best}
        step = which if isinstance(which, int) else found[which]()
        # A run that trains meanwhile may save between the looks of two processes.
        step = of_lead(-1 if step is None else step)
        if step not in self.steps():
            raise InputError(
                f"--step={which}: {self._folder.parent} has no such save; train it "
                f"first, or give one of the steps {self.steps()}."
            )
        return step

    def save(
        self,
        step: int,
        state: Any,
        data: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save `state` and `data`; both may change as soon as this returns.

        Old steps are removed once this one is complete. A step that is saved already
        is left as it is. Raises CheckpointError, also for the save before, which may
        have been under way until now; what was saved earlier is then untouched.
        """
        self.wait()
        saved = self.steps()
        if step in saved:
            _log.info("Step %d is saved already, and is left as it is.", step)
            return
        if saved and step < saved[-1]:
            raise InputError(
                f"Step {step} cannot be saved into {self._folder}, which has step "
                f"{saved[-1]}: a resume would not see it. Rename or remove the newer "
                "steps, or give another --workdir."
            )
        self._check_home(step)
        metrics = dict(metrics) if metrics else None
        label = Label(
            step=step,
            run=read_run_id(self._folder.parent),
            arrays=describe(state),
            metrics=metrics,
            data=json.loads(json.dumps(data)),
            checksums=checksums(state),
        )
        items = {"state": state, "data": label.to_json()}
        self._losses[step] = (metrics or {}).get("eval_loss"), data.get("eval")
        with self._writing(step, OSError), jax.transfer_guard("allow"):
            if self._writer is None:
                self._writer = self._open()
            response = self._writer.save_checkpointables_async(step, items, force=True)
        assert response is not None, "force=True always saves"
        self._pending = (step, response)

    def _check_home(self, step: int) -> None:
        """Raises CheckpointError if the run's folder has vanished, as with its disk.

        Orbax would create another one in its place, where nobody looks for it.
        """
        home = self._folder.parent
        if self._home is not None and _inode(home) != self._home:
            raise CheckpointError(
                f"{home} has vanished since the run began: step {step} is not saved. "
                "Mount or move it back; the same command resumes from its newest save."
            )

    def wait(self) -> None:
        """Waits for the save under way, if any; raises CheckpointError if it failed."""
        if self._pending is None:
            return
        step, response = self._pending
        with self._writing(step, Exception):
            response.result()
        self._pending = None

    def close(self) -> None:
        """Waits for the save under way, if any, and releases threads and files."""
        try:
            self.wait()
        finally:
            self._release()

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Returns state and data of `step`, placed as `abstract_state` says.

        Args:
          step: one of `steps()`.
          abstract_state: pytree of jax.ShapeDtypeStruct; its mesh need not be the one
            that saved. Without a sharding an array goes to the first local device.
            Structure, shapes and dtypes must be those of the checkpoint.
        """
        state, data = read_step(self._whole(step), abstract_state)
        return state, copy.deepcopy(data)

    def restore_newest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]]:
        """Returns the newest undamaged step, its state and its data.

        A damaged one is ignored from now on, with a warning; the next save renames it.
        Raises CheckpointError if no step is whole, for the run does not start anew, or
        if one cannot be read for another reason, for the next one would lose its work.
        """
        errors = []
        for step in reversed(self.steps()):
            try:
                return step, *self.restore(step, abstract_state)
            except DamagedError as error:
                _log.warning("%s It is ignored.", error)
                errors.append(str(error))
                self._damaged.add(step)
        errors += [f"{p} {f.text}." for p, f in find_steps(self._folder)[1].items()]
        raise CheckpointError(
            f"no step of {self._folder} can be read; put one back from a copy, or give "
            f"another --workdir. {' '.join(errors[-1:])}".rstrip()
        )

    def data(self, step: int) -> dict[str, Any]:
        """Returns the data of `step`, without reading its arrays."""
        return copy.deepcopy(read_label(self._whole(step)).data)

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Returns the parameters of `step`, without reading the optimizer state."""
        return read_params(self._whole(step), abstract_params)

    def _whole(self, step: int) -> Path:
        if step not in (steps := self.steps()):
            raise InputError(
                f"Step {step} is not in {self._folder}, which has "
                f"{f'the steps {steps}' if steps else 'none'}; use one of those."
            )
        return self._folder / str(step)

    def _open(self) -> ocp.training.Checkpointer:
        if jax.process_index() == 0:
            set_aside(self._folder, self._damaged)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("jaxllm.checkpoint")
        policies, config = ocp.training.preservation_policies, self._config
        kept: list[Any] = [policies.LatestN(config.keep_latest)]
        if config.keep_every:
            kept.append(policies.EveryNSteps(config.keep_every))
        if config.keep_best:
            kept.append(_KeepBest(self._best))
        return ocp.training.Checkpointer(
            str(self._folder),
            context=orbax_context(),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    def _release(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(Exception):  # raised by our `wait` already
                writer.wait()
            writer.close()

    @contextlib.contextmanager
    def _writing(self, step: int, kind: type[Exception]) -> Iterator[None]:
        try:
            yield
        except kind as error:
            self._pending = None
            self._release()  # so that the next save removes what this one left
            end_leftovers()
            raise CheckpointError(
                f"Step {step} could not be saved into {self._folder} "
                f"({reason(error)}). What was saved before is untouched: make room or "
                "the folder writable, and the same command resumes from there."
            ) from error


class _KeepBest:
    """Retention policy of Orbax: keep what `Checkpoints.best` returns."""

    def __init__(self, best: Callable[[Sequence[int]], int | None]):
        self._best = best

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        best = self._best([saved.step for saved in checkpoints])
        return [saved.step == best for saved in checkpoints]


def _metrics_of_old(folder: Path) -> dict[str, float] | None:
    """Returns the metrics of a save that has them in a file of their own, if any."""
    path = folder / "metrics" / "metrics"
    if not path.exists():
        return None
    with reading(folder):
        return parse_json(path.read_bytes())


def _inode(folder: Path) -> int | None:
    """Returns what tells a folder from another one at its path; None: there is none."""
    try:
        return folder.stat().st_ino
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        why = describe_os_error(error.errno, error.strerror)
        raise CheckpointError(f"{folder} cannot be read: {why}.") from error


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Drops Orbax's reports of progress, and of errors that reach us as exceptions."""
    if "/orbax/" not in record.pathname:
        return True
    return record.levelno >= logging.WARNING and not record.exc_info

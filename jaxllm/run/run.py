# SPDX-License-Identifier: Apache-2.0
"""The resources of a training loop, and what the loop asks of them."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxllm.cluster.agreement import Poll, is_lead, of_lead
from jaxllm.cluster.phases import Phases
from jaxllm.cluster.stragglers import Stragglers
from jaxllm.data.batches import Batch, Batches, batch_of
from jaxllm.inspect.profiler import Profiler
from jaxllm.records.interval import Interval
from jaxllm.records.ledger import Ledger
from jaxllm.records.metrics import MetricsWriter, Record
from jaxllm.run.anomalies import Anomalies, Rewind
from jaxllm.run.data import RunData
from jaxllm.run.evaluation import evaluate
from jaxllm.run.saves import Saved, Saves
from jaxllm.run.transfers import ExplicitTransfers
from jaxllm.step import Setup, TrainState
from jaxllm.step.bounds import place_bounds

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Streams:
    """What a run reads and writes step by step, and opens again for a rewind."""

    batches: Batches
    writer: MetricsWriter
    interval: Interval

    def close(self):
        """Stops the thread that makes batches, and closes the files of metrics."""
        self.batches.close()
        self.writer.close()


@dataclasses.dataclass
class Run:
    """The resources of a training loop, and the newest state.

    Attributes:
      open_streams: from a step on, without the batches left out.
      step: the compiled update; donates the state.
      eval_step: None without evaluations.
      check: tells whether a state is finite.
      num_updates: updates done.
      state: the state after them.
      evaluated: eval metrics of the last evaluation, by its step.
    """

    setup: Setup
    data: RunData
    saves: Saves
    anomalies: Anomalies
    open_streams: Callable[[int, Sequence[int]], Streams]
    streams: Streams
    step: jax.stages.Compiled
    eval_step: jax.stages.Compiled | None
    check: jax.stages.Compiled
    transfers: ExplicitTransfers
    poll: Poll
    stragglers: Stragglers
    phases: Phases
    ledger: Ledger
    profiler: Profiler
    num_updates: int
    state: TrainState
    evaluated: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    def is_asked_to_stop(self, answer: bool) -> bool:
        """Returns whether any process was, at the same step on each of them."""
        with self.phases("step"):  # the answer comes with the step before
            return self.poll(answer)

    def evaluate(self, step: int, state: TrainState) -> Iterator[Record]:
        """Yields the loss on held-out tokens before the update of a step."""
        yield from self._flush()
        assert self.eval_step is not None, "`open_run` compiles it if eval.every is set"
        with self.phases("eval"), self.data.eval_batches() as batches:
            each = self.phases.each(batches)
            result = evaluate(self.eval_step, state.params, each)
        self.evaluated = {step: result}
        yield from self._write(step, result)

    def is_best(self, step: int) -> bool:
        """Returns whether a state is to be saved because no evaluation was better."""
        if not self.setup.config.checkpoint.keep_best or step not in self.evaluated:
            return False
        with self.phases("save"):  # waits for the one under way
            return bool(of_lead(self.saves.is_best(self.evaluated[step])))

    def save(self, step: int, state: TrainState) -> Iterator[Record]:
        """Starts a checkpoint of the state before the update of a step.

        Yields what was not logged yet: a state whose metrics are bad is never saved.
        """
        yield from self._flush()
        saved = Saved(step, state, self.anomalies.to_json())
        with self.phases("save"):
            self.saves.save(saved, self.check, metrics=self.evaluated.get(step))
        self.ledger.write()

    def next_batch(self, step: int, should_stop: Callable[[], bool]) -> Batch | None:
        """Returns the batch of a step, which begins here; None: asked to stop first.

        One process of several waits on: the others may be in that step already.
        """
        if jax.process_count() > 1:
            should_stop = _never
        self.profiler.before(step, self.state)
        self.phases.step = step + 1
        interval = self.streams.interval
        with self.phases("data_wait"), interval.data_wait():
            batch = self.streams.batches.wait(should_stop)
        self.stragglers.add(interval.own_s)
        return batch

    def bounds(self, step: int) -> tuple[jax.Array, ...]:
        """Returns what the compiled step takes besides state and batch, if anything."""
        if self.setup.config.anomaly.policy != "skip":
            return ()
        return (place_bounds(self.anomalies.bounds(step), self.setup.mesh),)

    def log(self, step: int, state: TrainState, metrics: Any) -> Iterator[Record]:
        """Takes what a step gave; yields the log record of the step before, if due."""
        self.num_updates, self.state = step + 1, state
        self.profiler.after(step, state)
        with self.phases("step"):
            before = self.streams.interval.push(step, metrics)
        yield from self._log_late(before)

    def save_newest(self):
        """Saves the newest state, unless it cannot be resumed from.

        It cannot after an interrupted update, which leaves no state, nor after a step
        for which the run would rewind.
        """
        with contextlib.suppress(Rewind):
            self._save_newest()

    def _save_newest(self):
        step, state = self.num_updates, self.state
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            return
        if self.eval_step is not None and self._is_evaluated_only_now(step):
            for _ in self.evaluate(step, state):
                pass
        for _ in self.save(step, state):
            pass

    def _is_evaluated_only_now(self, step: int) -> bool:
        """Returns whether the loss of a state is not known, and will be asked for.

        Nothing is resumed once the last step is saved, and the loss that a save is kept
        for as the best is part of it.
        """
        config = self.setup.config
        is_due = step > 0 and step % config.eval.every == 0
        is_asked = step == config.steps or (config.checkpoint.keep_best and is_due)
        return is_asked and step not in self.evaluated

    def rewind(self):
        """Restores the newest checkpoint, or the initial state, as at a new start."""
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()  # whoever still holds it: there is room for one state only
        # Random keys and Orbax's threads move what they need, once and not each step.
        with self.phases("restore"), self.transfers.lifted():
            saved = self.saves.newest()
        self.num_updates, self.state = saved.step, saved.state
        self.anomalies.go_to(saved.anomalies)
        self.close()
        self.streams = self.open_streams(saved.step, self.anomalies.left_out)
        self.evaluated = {}
        self.phases.step = saved.step
        self.ledger.write()

    def close(self):
        """Ends a trace under way, and closes the streams."""
        self.profiler.close()
        self.streams.close()

    def _flush(self) -> Iterator[Record]:
        """Waits for the step under way, so that no other phase has its time."""
        with self.phases("step"):
            values = self.streams.interval.flush()
        yield from self._log_late(values)

    def _log_late(self, values: Record | None) -> Iterator[Record]:
        """Judges the metrics of a step; yields a log record, if due."""
        if values is None:
            return
        self._judge(values)
        step, interval = values["step"], self.streams.interval
        interval.add(values)
        if step % self.setup.config.logging.every == 0:
            counts = self.anomalies.metrics(since=interval.first_step)
            scalars = interval.end(counts, self.ledger.goodput())
            self.stragglers.exchange(scalars["step_s"])
            yield from self._write(step, scalars)

    def _write(self, step: int, scalars: Mapping[str, float]) -> Iterator[Record]:
        """Writes the scalars of a step, and yields them."""
        record = self.streams.writer.write(step, scalars)
        with self.transfers.lifted():  # for whoever takes it
            yield record

    def _judge(self, values: Record):
        """Raises what an anomaly asks for, or says that the step was skipped."""
        batch = batch_of(values["step"], self.anomalies.left_out)
        anomaly = self.anomalies.judge(values, batch)
        if anomaly is None:
            return
        if anomaly.action == "stop":
            raise self.saves.stop_error(anomaly.what, anomaly.advice)
        if is_lead():
            _log.warning("%s", anomaly)
        if anomaly.action == "rewind":
            raise Rewind(anomaly)


def _never() -> bool:
    return False

# SPDX-License-Identifier: Apache-2.0
"""A run under way: what the loop of `train` calls, and the resources behind it."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxllm.cluster.agreement import Poll, is_lead
from jaxllm.cluster.phases import Phases
from jaxllm.cluster.stragglers import Stragglers
from jaxllm.data.batches import Batches, batch_of
from jaxllm.inspect.profiler import Profiler
from jaxllm.plan import budget
from jaxllm.records.ledger import Ledger
from jaxllm.records.metrics import LateMetrics, MetricsWriter, device_memory_bytes
from jaxllm.run.anomalies import Anomalies, Rewind
from jaxllm.run.evaluation import evaluate, held_out
from jaxllm.run.saves import Position, Positions
from jaxllm.step import Setup, TrainState
from jaxllm.step.bounds import place_bounds

_log = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclasses.dataclass
class Run:
    """The resources of a run, and the state that it starts from.

    Attributes:
      reopen: opens metrics and batches from a step on, without the batches left out.
      first_step: updates done before.
      state: the state after them.
    """

    setup: Setup
    positions: Positions
    anomalies: Anomalies
    reopen: Callable[[int, Sequence[int]], tuple[MetricsWriter, Batches]]
    writer: MetricsWriter
    batches: Batches
    step: jax.stages.Compiled
    eval_step: jax.stages.Compiled | None
    check: jax.stages.Compiled
    poll: Poll
    stragglers: Stragglers
    phases: Phases
    ledger: Ledger
    profiler: Profiler
    first_step: int
    state: TrainState

    def __post_init__(self):
        self._begin()

    def _begin(self):
        self._newest = (self.first_step, self.state)
        self._read_at_s = time.perf_counter()
        self._late = LateMetrics()
        self._interval: list[Record] = []  # steps read since the last logged one
        self._eval: tuple[int, dict[str, float]] = (-1, {})

    def is_asked_to_stop(self, answer: bool) -> bool:
        """Returns whether any process was, and at the same step on each of them."""
        with self.phases("step"):  # the answer comes with the step before
            return self.poll(answer)

    def update(self, step: int, state: TrainState) -> tuple[TrainState, Any]:
        """Takes the batch of a step and starts its update; the old state is gone."""
        self.profiler.before(step, state)
        self.phases.step = step + 1
        with self.phases("data_wait"):
            self._began_at_s = time.perf_counter()
            batch = next(self.batches)
            self._data_wait_s = time.perf_counter() - self._began_at_s
        self.stragglers.add(time.perf_counter() - self._read_at_s)
        with self.phases("step"), jax.transfer_guard("disallow"):
            state, metrics = self.step(state, batch, *self._bounds(step))
        self._newest = (step + 1, state)
        self.profiler.after(step, state)
        return state, metrics

    def log(self, step: int, metrics: Any) -> Iterator[Record]:
        """Takes the metrics of a step just started; yields those before, if due."""
        with self.phases("step"):
            before = self._late.push(
                step,
                metrics,
                began_at_s=self._began_at_s,
                data_wait_s=self._data_wait_s,
            )
        self._read_at_s = time.perf_counter()
        yield from self._write(before)

    def evaluate(self, step: int, state: TrainState) -> Iterator[Record]:
        """Yields the loss on held-out tokens before the update of a step."""
        yield from self._flush()
        assert self.eval_step is not None, "`open_run` compiles it if eval.every is set"
        with self.phases("eval"), held_out(self.setup) as batches:
            each = self.phases.each(batches)
            result = evaluate(self.eval_step, state.params, each)
        self._eval = (step, result)
        yield self.writer.write(step, result)

    def save(self, step: int, state: TrainState) -> Iterator[Record]:
        """Starts to save, after reading what is pending: no bad state is saved."""
        yield from self._flush()
        eval_step, result = self._eval
        metrics = result if eval_step == step else None
        position = Position(step, state, self.anomalies.to_json())
        with self.phases("save"):
            self.positions.save(position, self.check, metrics=metrics)
        self.ledger.write()

    def save_newest(self):
        """Saves where the run stands, unless that is no place to go on from.

        It is none after an interrupted update, which leaves no state, nor after a step
        from which the run would go back.
        """
        with contextlib.suppress(Rewind):
            self._save_newest()

    def _save_newest(self):
        step, state = self._newest
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            return
        is_last = step == self.setup.config.steps
        if is_last and self.eval_step is not None and self._eval[0] != step:
            # Nothing is resumed once the last step is saved: evaluate it now.
            for _ in self.evaluate(step, state):
                pass
        for _ in self.save(step, state):
            pass

    def rewind(self):
        """Goes back to the newest save, or to the beginning, as at a new start."""
        for leaf in jax.tree.leaves(self._newest[1]):
            leaf.delete()  # whoever still holds it: there is room for one state only
        with self.phases("restore"):
            position = self.positions.newest()
        self.first_step, self.state = position.step, position.state
        self.anomalies.go_to(position.anomalies)
        self.close()
        reopened = self.reopen(self.first_step, self.anomalies.left_out)
        self.writer, self.batches = reopened
        self.phases.step = self.first_step
        self.ledger.write()
        self._begin()

    def close(self):
        """Stops the thread that makes batches, and closes the files of metrics."""
        self.profiler.close()
        self.batches.close()
        self.writer.close()

    def _flush(self) -> Iterator[Record]:
        """Waits for the step under way, so that no other phase has its time."""
        with self.phases("step"):
            values = self._late.flush()
        yield from self._write(values)

    def _write(self, values: Record | None) -> Iterator[Record]:
        """Checks the numbers of one step; yields the means of an interval, if due."""
        if values is None:
            return
        self._judge(values)
        self._interval.append(values)
        config = self.setup.config
        if values["step"] % config.logging.every == 0:
            summary = self._summary(values)
            self.stragglers.exchange(summary["step_s"])
            yield self.writer.write(values["step"], summary)
            self._interval = []

    def _summary(self, values: Record) -> dict[str, float]:
        config, steps = self.setup.config, len(self._interval)
        step_s = math.fsum(v["step_s"] for v in self._interval) / steps
        wait_s = math.fsum(v["data_wait_s"] for v in self._interval) / steps
        tokens_per_s = config.data.batch_size * config.data.sequence_length / step_s
        device = self.setup.mesh.devices.flat[0]
        mfu = budget.mfu(
            config.model,
            config.data.sequence_length,
            tokens_per_s,
            device.device_kind,
            self.setup.mesh.size,
        )
        memory_bytes = device_memory_bytes()
        return {
            "loss": values["loss"],
            "objective": values["objective"],
            "grad_norm": values["grad_norm"],
            "lr": values["lr"],
            "num_targets": values["num_targets"],
            **{k: v for k, v in values.items() if k.startswith("router_")},
            **self.anomalies.metrics(since=self._interval[0]["step"]),
            "tokens_per_s": tokens_per_s,
            "mfu": math.nan if mfu is None else mfu,  # null in metrics.jsonl
            "step_s": step_s,
            "data_wait_s": wait_s,
            "goodput": self.ledger.goodput(),
            **({} if memory_bytes is None else {"memory_bytes": memory_bytes}),
        }

    def _judge(self, values: Record):
        """Raises what an anomaly asks for, or says that it was skipped."""
        batch = batch_of(values["step"], self.anomalies.left_out)
        anomaly = self.anomalies.judge(values, batch)
        if anomaly is None:
            return
        if anomaly.action == "stop":
            raise self.positions.stopped(anomaly.what, anomaly.advice)
        if is_lead():
            _log.warning("%s", anomaly)
        if anomaly.action == "rewind":
            raise Rewind(anomaly)

    def _bounds(self, step: int) -> Iterator[jax.Array]:
        """Yields what the compiled step takes besides state and batch."""
        if self.setup.config.anomaly.policy == "skip":
            yield place_bounds(self.anomalies.bounds(step), self.setup.mesh)

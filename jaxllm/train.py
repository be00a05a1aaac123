# SPDX-License-Identifier: Apache-2.0
"""Trains a model.

python -m jaxllm.train --config configs/x.py --workdir runs/x [--config.a.b=v ...]

The same command resumes. Exit status: 0 finished, 2 wrong input, 75 stopped early and
resumable, 1 anything else.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

import sharding
from jaxllm import flags
from jaxllm.cluster import agreement, membership
from jaxllm.cluster.phases import Phases, process_age_s
from jaxllm.cluster.preemption import Preempted, stop_signals
from jaxllm.config import Config
from jaxllm.plan.cost import full_report
from jaxllm.records.console import Console
from jaxllm.run.anomalies import Rewind
from jaxllm.run.compilation_cache import use_compilation_cache
from jaxllm.run.run import Run
from jaxllm.run.startup import open_run
from jaxllm.step import prepare

Record = dict[str, Any]

GOES_ON = "the same command goes on from there."


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    overwrite: bool = False,
    profile_steps: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    phases: Phases | None = None,
) -> Generator[Record, None, None]:
    """Trains to `config.steps`, from the newest save in workdir if there is one.

    Leaving the loop over its records early saves the run: it can be resumed.

    Args:
      config: all settings.
      workdir: the run's own directory.
      overwrite: delete the run in it first.
      profile_steps: how many steps to take apart; see `jaxllm.inspect.profiler`.
      should_stop: asked before every step.
      phases: of this process, which may be older than the run; None begins them now.

    Yields:
      A record of each logged step and each evaluation, as in metrics.jsonl.

    Raises:
      InputError, sharding.ShardingError: before anything is compiled or written.
      Preempted: should_stop said so, and the state is saved.
      FloatingPointError: a loss, gradient or update is not finite; none of it is saved.
    """
    phases = phases or Phases()
    options: dict[str, Any] = dict(overwrite=overwrite, profile_steps=profile_steps)
    with open_run(config, Path(workdir), phases, **options) as run:
        while run is not None:
            try:
                yield from _to_the_end(run, config, should_stop)
                return
            except Rewind:
                run.rewind()


def _to_the_end(
    run: Run, config: Config, should_stop: Callable[[], bool]
) -> Generator[Record, None, None]:
    """Trains from where the run stands; each step is a pure function of it."""
    state = run.state
    # The order below matters. Evaluating and saving see the state before the update,
    # and the batch is taken after the save, so that a save holds parameters and data
    # position of one instant. Metrics are read one step late, so that the devices never
    # wait for the host.
    for step in range(run.first_step, config.steps):
        stop = run.is_asked_to_stop(should_stop())
        if due(step, config.eval.every):
            yield from run.evaluate(step, state)
        if stop or due(step, config.checkpoint.every):
            yield from run.save(step, state)
        if stop:
            raise Preempted(step)
        state, metrics = run.update(step, state)
        yield from run.log(step, metrics)
    if config.eval.every:
        yield from run.evaluate(config.steps, state)
    yield from run.save(config.steps, state)


def due(step: int, every: int) -> bool:
    """Returns whether something done every so many steps is done before this one."""
    return every > 0 and step > 0 and step % every == 0


def dry_run(config: Config) -> str:
    """Returns the plan of a run: parameters, placement, bytes a device and FLOPs."""
    setup = prepare(config, sharding.make_mesh(config.mesh.sizes))
    return full_report(setup)


def main(argv: list[str]) -> int:
    del argv
    values, phases = absl_flags.FLAGS, Phases(age_s=process_age_s())
    config = flags.config_from_flags()
    membership.join(config.distributed, phases)
    use_compilation_cache()
    if values.dry_run:
        print(dry_run(config))
        return flags.FINISHED
    workdir = flags.workdir_from_flags()
    membership.write_stacks_to(workdir)
    with Console(config.steps) as console, stop_signals() as should_stop:
        console.take_logs(logging.INFO if agreement.is_lead() else logging.WARNING)
        records = train(
            config,
            workdir,
            overwrite=values.overwrite,
            profile_steps=values.profile,
            should_stop=should_stop,
            phases=phases,
        )
        try:
            # Whatever ends the loop, the run is saved now: as the interpreter shuts
            # down, it would be too late.
            with contextlib.closing(records):
                for record in records:
                    if agreement.is_lead():
                        console.show(record)
        except Preempted as stop:
            if agreement.is_lead():
                console.say(f"stopped at step {stop}; {GOES_ON}")
            return flags.RESUMABLE
    if agreement.is_lead():
        print(f"finished: {workdir}")
    return flags.FINISHED


def define_flags() -> None:
    """Declares what the command takes; `main` reads it."""
    flags.define_config_flags()
    absl_flags.DEFINE_bool(
        "dry_run", False, "print placement, memory and FLOPs, then stop"
    )
    absl_flags.DEFINE_bool(
        "overwrite", False, "delete the run in --workdir and start anew"
    )
    absl_flags.DEFINE_integer(
        "profile",
        0,
        "number of steps to profile, after ten warm-up steps",
        lower_bound=0,
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main)

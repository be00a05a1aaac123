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

from absl import flags as absl_flags

import sharding
from jaxllm import flags
from jaxllm.cluster import agreement, membership
from jaxllm.cluster.phases import Phases, process_age_s
from jaxllm.cluster.preemption import Preempted, stop_signals
from jaxllm.config import Config
from jaxllm.plan.cost import full_report
from jaxllm.records.console import Console
from jaxllm.records.metrics import Record
from jaxllm.run.anomalies import Rewind
from jaxllm.run.at_exit import missed_at_exit
from jaxllm.run.compilation_cache import use_compilation_cache
from jaxllm.run.startup import open_run
from jaxllm.step import prepare

RESUMES = "the same command resumes from there."


@missed_at_exit
def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    overwrite: bool = False,
    profile_steps: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    phases: Phases | None = None,
) -> Generator[Record, None, None]:
    """Trains to `config.steps`, from the newest checkpoint in workdir if there is one.

    A caller that leaves the loop over its records early leaves a checkpoint to resume.
    One that gives them a name must close them, as with `contextlib.closing`, before the
    program ends: then it is too late.

    Args:
      config: all settings.
      workdir: the run's own directory.
      overwrite: delete the run in it first.
      profile_steps: number of steps to profile; see `jaxllm.inspect.profiler`.
      should_stop: asked before every step.
      phases: of this process, which may be older than the run; None begins them now.

    Yields:
      A record of each logged step and each evaluation, as in metrics.jsonl.

    Raises:
      TypeError, InputError, sharding.ShardingError: before anything is compiled or
        written.
      Preempted: should_stop returned true, and the state is saved.
      FloatingPointError: a loss, gradient or update is not finite; none of it is saved.
    """
    phases = phases or Phases()
    opened = open_run(
        config,
        workdir,
        phases,
        overwrite=overwrite,
        profile_steps=profile_steps,
    )
    with opened as run:
        while run is not None:  # None: all steps are done
            try:
                state = run.state
                for step in range(run.num_updates, config.steps):
                    stop = run.is_asked_to_stop(should_stop())
                    if due(step, config.eval.every):
                        yield from run.evaluate(step, state)
                    if stop or run.is_best(step) or due(step, config.checkpoint.every):
                        yield from run.save(step, state)
                    if stop:
                        raise Preempted(step)
                    # Only after the save: it holds state and data of one instant.
                    batch = run.next_batch(step, should_stop)
                    if batch is None:  # asked to stop while it waited for data
                        yield from run.save(step, state)
                        raise Preempted(step)
                    with phases("step"):
                        state, metrics = run.step(state, batch, *run.bounds(step))
                    # One step late, so that the devices never wait for the host.
                    yield from run.log(step, state, metrics)
                if config.eval.every:
                    yield from run.evaluate(config.steps, state)
                yield from run.save(config.steps, state)
                return
            except Rewind:
                run.rewind()


def due(step: int, every: int) -> bool:
    """Returns whether an evaluation or a checkpoint is due before a step."""
    return every > 0 and step > 0 and step % every == 0


def dry_run(config: Config) -> str:
    """Returns the plan of a run: parameters, shardings, bytes a device and FLOPs."""
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
            # Whatever ends the loop closes the run now: as the interpreter shuts down,
            # it would be too late for a checkpoint.
            with contextlib.closing(records):
                for record in records:
                    if agreement.is_lead():
                        console.show(record)
        except Preempted as stop:
            if agreement.is_lead():
                console.say(f"stopped at step {stop}; {RESUMES}")
            return flags.RESUMABLE
    if agreement.is_lead():
        print(f"finished: {workdir}")
    return flags.FINISHED


def define_flags() -> None:
    """Defines the flags of the command."""
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
    flags.run(main, needs_output=False)

# SPDX-License-Identifier: Apache-2.0
"""What happens before the first step: check, claim, resume, compile."""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import sharding
from jaxllm.checkpoint import Checkpoints
from jaxllm.checkpoint.label import give_run_id
from jaxllm.checkpoint.steps import CHECKPOINTS, find_steps
from jaxllm.cluster.agreement import Poll, describe, is_lead, of_lead, on_lead
from jaxllm.cluster.phases import Phases
from jaxllm.cluster.sameness import check_same
from jaxllm.cluster.stragglers import Stragglers
from jaxllm.config import Config
from jaxllm.config.saved import write_config
from jaxllm.errors import InputError
from jaxllm.files import local_path
from jaxllm.inspect.profiler import FOLDER, SKIPPED, TRACEABLE, Profiler
from jaxllm.plan import budget
from jaxllm.plan.cost import choices, cost_report
from jaxllm.plan.kernels import check_kernels
from jaxllm.plan.room import check_step, check_training
from jaxllm.records.interval import Interval
from jaxllm.records.ledger import Ledger
from jaxllm.records.metrics import MetricsWriter, check_loggers
from jaxllm.run.anomalies import Anomalies
from jaxllm.run.data import RunData, open_run_data, open_train_data
from jaxllm.run.origin import check_origin, keep_origin
from jaxllm.run.rate_change import warn_of_rate
from jaxllm.run.run import Run, Streams
from jaxllm.run.saved_model import save_tokenizer
from jaxllm.run.saves import Saved, Saves
from jaxllm.run.transfers import ExplicitTransfers
from jaxllm.run.workdir import claim
from jaxllm.step import Setup, compile_check, compile_eval, compile_step, prepare

Compiled = jax.stages.Compiled
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_run(
    config: Config,
    workdir: str | os.PathLike[str],
    phases: Phases,
    *,
    overwrite: bool,
    profile_steps: int = 0,
) -> Iterator[Run | None]:
    """Opens everything that a run needs; yields None if it has finished already.

    Within, implicit transfers are refused. A caller that leaves early, by leaving the
    loop or with Ctrl-C, leaves a checkpoint to resume.

    Raises:
      TypeError, InputError, sharding.ShardingError: before anything is compiled or
        written.
      KernelMismatch: a kernel gives wrong numbers on this machine.
    """
    workdir = _check_arguments(config, workdir)
    started_with = {
        "the last part of --workdir": workdir.absolute().name,
        "--overwrite": overwrite,
        "--profile": profile_steps,
    }
    setup, data, report = _check(config, started_with)
    with contextlib.ExitStack() as stack:
        own = claim(workdir, config, overwrite=overwrite)
        on_lead(lambda: stack.enter_context(own))
        ledger = stack.enter_context(Ledger(workdir if is_lead() else None, phases))
        checkpoints = Checkpoints(workdir / CHECKPOINTS, config.checkpoint)
        stack.enter_context(checkpoints)
        stack.callback(phases.begin, "save")  # closing waits for the one under way
        num_saved = of_lead(checkpoints.latest() or 0)
        if num_saved == config.steps:
            _log.info(
                "%s has finished its %d steps; go on with --config.steps=%d, say.",
                workdir,
                config.steps,
                2 * config.steps,
            )
            yield None
            return
        _log.info("%s", report)
        if config.kernels.self_check:
            check_kernels(config, setup.mesh)
        _check_steps(config, num_saved, profile_steps)
        saves = Saves(setup, checkpoints, data.fingerprint, data.eval_fingerprint)
        with phases("start" if checkpoints.is_empty() else "restore"):
            saved = saves.newest()
        # One that only some of them can read would not do.
        check_same(config, {"the save to resume from": saved.step})
        on_lead(lambda: warn_of_rate(workdir, config, saved.step))
        ledger.begin(saved.step)
        on_lead(lambda: _describe_run(workdir, config))
        run = _assemble(data, saves, saved, ledger, phases, workdir, profile_steps)
        stack.enter_context(run.stragglers)
        stack.callback(run.close)
        phases.begin("other")
        with run.transfers:
            try:
                yield run
            except (GeneratorExit, KeyboardInterrupt):
                run.save_newest()
                raise


def _check_arguments(config: object, workdir: object) -> Path:
    if not isinstance(config, Config):
        raise TypeError(
            f"config is of type {type(config).__name__}, and must be a "
            "jaxllm.config.Config; jaxllm.config.load_config reads one from a file."
        )
    if not isinstance(workdir, str | os.PathLike):
        raise TypeError(
            f"workdir is {workdir!r}, and must be the path of the run's own directory, "
            "such as 'runs/first'."
        )
    return local_path("--workdir", workdir)


def _check(
    config: Config, started_with: Mapping[str, Any]
) -> tuple[Setup, RunData, str]:
    """Returns the plan of a run, its tokens, and what is said of both at its start.

    All that the run will read is opened: what is wrong is refused now, not in an hour.

    Args:
      config: of the run.
      started_with: other arguments, which all processes must have in common.
    """
    setup = prepare(config, sharding.make_mesh(config.mesh.sizes))
    check_training(setup)
    report = f"{describe()}\n{cost_report(setup)}\n{choices(setup)}"
    check_loggers(config.logging)
    check_origin(config)
    data = open_run_data(setup) if config.eval.every else open_train_data(setup)
    check_same(config, {**started_with, **data.identity})
    return setup, data, report


def _assemble(
    data: RunData,
    saves: Saves,
    saved: Saved,
    ledger: Ledger,
    phases: Phases,
    workdir: Path,
    profile_steps: int,
) -> Run:
    """Returns the resources of the loop, which starts from a checkpoint."""
    setup = data.setup
    anomalies = Anomalies(setup.config.anomaly, setup.leaf_paths)
    anomalies.go_to(saved.anomalies)
    with phases("compile"):
        step, eval_step, check = _compile(setup, profile_steps)
    profiler = Profiler(
        workdir / FOLDER if is_lead() else None,
        step,
        phases,
        first=saved.step + SKIPPED,
        number=profile_steps,
    )
    open_streams = functools.partial(_open_streams, data, workdir)
    return Run(
        setup=setup,
        data=data,
        saves=saves,
        anomalies=anomalies,
        step=step,
        eval_step=eval_step,
        check=check,
        transfers=ExplicitTransfers(),
        poll=Poll(setup.mesh),
        stragglers=Stragglers(setup.mesh),
        phases=phases,
        ledger=ledger,
        profiler=profiler,
        num_updates=saved.step,
        state=saved.state,
        open_streams=open_streams,
        streams=open_streams(saved.step, anomalies.left_out),
    )


def _open_streams(
    data: RunData, workdir: Path, step: int, left_out: Sequence[int]
) -> Streams:
    setup, config = data.setup, data.setup.config
    length = config.data.sequence_length

    def mfu(tokens_per_s: float) -> float | None:
        kind = setup.mesh.devices.flat[0].device_kind
        size = setup.mesh.size
        return budget.mfu(config.model, length, tokens_per_s, kind, size)

    writer = MetricsWriter(
        workdir, config.logging, run_name=workdir.name, resume_step=step
    )
    interval = Interval(mfu)
    return Streams(data.batches(step, left_out), writer, interval)


def _describe_run(workdir: Path, config: Config):
    steps = find_steps(workdir / CHECKPOINTS)[0]
    give_run_id(workdir, workdir / CHECKPOINTS / str(steps[-1]) if steps else None)
    write_config(workdir, config)
    save_tokenizer(config.data.paths, workdir)
    keep_origin(config, workdir)


def _check_steps(config: Config, saved: int, profile_steps: int):
    if saved > config.steps:
        raise InputError(
            f"config.steps={config.steps} is below the saved step {saved}; set it "
            "above that, or give another --workdir, or --overwrite to begin again."
        )
    first = saved + SKIPPED
    if profile_steps < 0 or (profile_steps and first + profile_steps > config.steps):
        raise InputError(
            f"--profile={profile_steps} must be at least 0, and its steps begin with "
            f"{first}, after the first {SKIPPED} of this start, of which "
            f"config.steps={config.steps} leaves {max(0, config.steps - first)}; lower "
            "--profile, or raise config.steps."
        )


def _compile(
    setup: Setup, profile_steps: int
) -> tuple[Compiled, Compiled | None, Compiled]:
    """Returns what the loop runs: the step, the evaluation if any, the check."""
    compile_it = functools.partial(
        compile_step, options=TRACEABLE if profile_steps else None
    )
    step, eval_step = _timed("step", compile_it, setup), None
    check_step(setup, step)
    if setup.config.eval.every:
        eval_step = _timed("evaluation", compile_eval, setup)
    return step, eval_step, compile_check(setup)


def _timed(name: str, make: Callable[[Setup], Compiled], setup: Setup) -> Compiled:
    began_at_s = time.perf_counter()
    compiled = make(setup)
    _log.info("compiled the %s in %.1f s", name, time.perf_counter() - began_at_s)
    return compiled

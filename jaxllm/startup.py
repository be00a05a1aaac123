# SPDX-License-Identifier: Apache-2.0
"""What happens before the first step: all is checked, claimed, restored, compiled."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

import sharding
from jaxllm.checkpoint import Checkpoints
from jaxllm.config import Config, InputError
from jaxllm.data.batches import Batches, load_batches
from jaxllm.data.formats import TokenSplit
from jaxllm.data.splits import (
    check_vocab,
    data_fingerprint,
    describe_change,
    open_splits,
)
from jaxllm.distributed import Poll, describe, is_lead, of_lead, on_lead
from jaxllm.evaluate import held_out
from jaxllm.kernels import check_kernels
from jaxllm.metrics import MetricsWriter, check_loggers
from jaxllm.report import choices, cost_report
from jaxllm.resilience.ledger import Ledger
from jaxllm.resilience.phases import Phases
from jaxllm.run import Run
from jaxllm.savedconfig import write_config
from jaxllm.savedrun import save_tokenizer
from jaxllm.step import (
    Setup,
    TrainState,
    compile_check,
    compile_eval,
    compile_step,
    init_state,
    prepare,
)
from jaxllm.workdir import CHECKPOINTS, claim

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_run(
    config: Config, workdir: Path, phases: Phases, *, overwrite: bool
) -> Iterator[Run | None]:
    """Opens everything that a run needs; yields None if it has finished already.

    Whoever leaves early, by leaving the loop or with Ctrl-C, leaves a saved run.

    Raises:
      InputError, sharding.ShardingError: before anything is compiled or written.
      KernelMismatch: a kernel gives wrong numbers on this machine.
    """
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    setup = prepare(config, mesh)
    report = f"{describe()}\n{cost_report(setup)}\n{choices(setup)}"
    check_loggers(config.logging)
    splits = _open_data(setup)
    data = data_fingerprint(config.data, splits)
    with contextlib.ExitStack() as stack:
        on_lead(
            lambda: stack.enter_context(claim(workdir, config, overwrite=overwrite))
        )
        ledger = stack.enter_context(Ledger(workdir if is_lead() else None, phases))
        checkpoints = Checkpoints(workdir / CHECKPOINTS, config.checkpoint)
        stack.enter_context(checkpoints)
        stack.callback(phases.begin, "save")  # closing waits for the one under way
        first_step = of_lead(checkpoints.latest() or 0)
        if first_step == config.steps:
            _log.info("%s has finished its %d steps.", workdir, config.steps)
            yield None
            return
        _log.info("%s", report)
        if config.kernels.self_check:
            check_kernels(config, mesh)
        with phases("restore" if checkpoints.steps() else "start"):
            first_step, state = _restore_or_init(setup, checkpoints, first_step, data)
        ledger.begin(first_step)
        on_lead(lambda: _describe_run(workdir, config))
        with phases("compile"):
            step = _timed("step", compile_step, setup)
            eval_step = None
            if config.eval.every:
                eval_step = _timed("evaluation", compile_eval, setup)
            check = compile_check(setup)
        run = Run(
            setup=setup,
            checkpoints=checkpoints,
            writer=stack.enter_context(
                MetricsWriter(
                    workdir,
                    config.logging,
                    run_name=workdir.name,
                    resume_step=first_step,
                )
            ),
            batches=stack.enter_context(_batches(setup, splits, first_step)),
            step=step,
            eval_step=eval_step,
            check=check,
            poll=Poll(setup.mesh),
            data=data,
            phases=phases,
            ledger=ledger,
            first_step=first_step,
            state=state,
        )
        phases.begin("other")
        try:
            yield run
        except (GeneratorExit, KeyboardInterrupt):
            run.save_newest()
            raise


def _describe_run(workdir: Path, config: Config):
    write_config(workdir, config)
    save_tokenizer(config.data.paths, workdir)


def _open_data(setup: Setup) -> Sequence[TokenSplit]:
    """Returns the tokens of a run, after checking all that it will read."""
    config = setup.config
    splits = open_splits(config.data, "train")
    check_vocab(splits, config.model.vocab_size)
    if config.eval.every:
        held_out(setup).close()  # refuses what is wrong with it now, not in an hour
    return splits


def _batches(setup: Setup, splits: Sequence[TokenSplit], start: int) -> Batches:
    return load_batches(
        setup.config.data,
        splits,
        seed=setup.config.seed,
        sharding=setup.abstract_batch["tokens"].sharding,
        start=start,
        vocab_size=setup.config.model.vocab_size,
    )


def _restore_or_init(
    setup: Setup, checkpoints: Checkpoints, step: int, data: dict[str, Any]
) -> tuple[int, TrainState]:
    """Returns the updates done and the state: the newest intact save, or a new one."""
    if not checkpoints.steps():
        return 0, init_state(setup)
    if step > setup.config.steps:
        raise InputError(
            f"config.steps={setup.config.steps} is below the saved step {step}; set it "
            "above that, or give another --workdir, or --overwrite to begin again."
        )
    began_at_s = time.perf_counter()
    step, state, saved = checkpoints.restore_newest(setup.abstract_state)
    if change := describe_change(saved["batches"], data):
        raise InputError(change)
    seconds = time.perf_counter() - began_at_s
    _log.info("resuming from step %d (read in %.1f s)", step, seconds)
    return step, state


def _timed(
    name: str, make: Callable[[Setup], jax.stages.Compiled], setup: Setup
) -> jax.stages.Compiled:
    began_at_s = time.perf_counter()
    compiled = make(setup)
    _log.info("compiled the %s in %.1f s", name, time.perf_counter() - began_at_s)
    return compiled

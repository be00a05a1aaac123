# SPDX-License-Identifier: Apache-2.0
"""What happens before the first step: all is checked, claimed, restored, compiled."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

import sharding
from jaxllm.checkpoint import Checkpoints
from jaxllm.config import Config, InputError
from jaxllm.data.batches import load_batches
from jaxllm.data.splits import (
    check_vocab,
    data_fingerprint,
    describe_change,
    open_splits,
)
from jaxllm.distributed import Poll, describe, of_lead, on_lead
from jaxllm.evaluate import held_out
from jaxllm.kernels import check_kernels
from jaxllm.metrics import MetricsWriter, check_loggers
from jaxllm.report import choices, cost_report
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
def open_run(config: Config, workdir: Path, *, overwrite: bool) -> Iterator[Run | None]:
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
    splits = open_splits(config.data, "train")
    check_vocab(splits, config.model.vocab_size)
    data = data_fingerprint(config.data, splits)
    if config.eval.every:
        held_out(setup).close()  # refuses what is wrong with it now, not in an hour
    with contextlib.ExitStack() as stack:
        on_lead(
            lambda: stack.enter_context(claim(workdir, config, overwrite=overwrite))
        )
        checkpoints = Checkpoints(workdir / CHECKPOINTS, config.checkpoint)
        stack.enter_context(checkpoints)
        first_step = of_lead(checkpoints.latest() or 0)
        if first_step == config.steps:
            _log.info("%s has finished its %d steps.", workdir, config.steps)
            yield None
            return
        _log.info("%s", report)
        if config.kernels.self_check:
            check_kernels(config, mesh)
        first_step, state = _restore_or_init(setup, checkpoints, first_step, data)
        on_lead(lambda: _describe_run(workdir, config))
        batches = load_batches(
            config.data,
            splits,
            seed=config.seed,
            sharding=setup.abstract_batch["tokens"].sharding,
            start=first_step,
            vocab_size=config.model.vocab_size,
        )
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
            batches=stack.enter_context(batches),
            step=_timed("step", compile_step, setup),
            eval_step=(
                _timed("evaluation", compile_eval, setup) if config.eval.every else None
            ),
            check=compile_check(setup),
            poll=Poll(setup.mesh),
            data=data,
            first_step=first_step,
            state=state,
        )
        try:
            yield run
        except (GeneratorExit, KeyboardInterrupt):
            run.save_newest()
            raise


def _describe_run(workdir: Path, config: Config):
    write_config(workdir, config)
    save_tokenizer(config.data.paths, workdir)


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

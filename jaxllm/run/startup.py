# SPDX-License-Identifier: Apache-2.0
"""What happens before the first step: all is checked, claimed, restored, compiled."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

import sharding
from jaxllm.checkpoint import Checkpoints
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.cluster.agreement import Poll, describe, is_lead, of_lead, on_lead
from jaxllm.cluster.phases import Phases
from jaxllm.cluster.stragglers import Stragglers
from jaxllm.config import Config
from jaxllm.config.saved import write_config
from jaxllm.data.batches import Batches, load_batches
from jaxllm.data.formats import TokenSplit
from jaxllm.data.splits import (
    check_vocab,
    data_fingerprint,
    open_splits,
)
from jaxllm.errors import InputError
from jaxllm.inspect.profiler import FOLDER, SKIPPED, TRACEABLE, Profiler
from jaxllm.plan.cost import choices, cost_report
from jaxllm.plan.kernels import check_kernels
from jaxllm.records.ledger import Ledger
from jaxllm.records.metrics import MetricsWriter, check_loggers
from jaxllm.run.anomalies import Anomalies
from jaxllm.run.evaluation import held_out
from jaxllm.run.run import Run
from jaxllm.run.saved_model import save_tokenizer
from jaxllm.run.saves import Positions
from jaxllm.run.workdir import claim
from jaxllm.step import (
    Setup,
    compile_check,
    compile_eval,
    compile_step,
    prepare,
)

Compiled = jax.stages.Compiled
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_run(
    config: Config,
    workdir: Path,
    phases: Phases,
    *,
    overwrite: bool,
    profile_steps: int = 0,
) -> Iterator[Run | None]:
    """Opens everything that a run needs; yields None if it has finished already.

    Whoever leaves early, by leaving the loop or with Ctrl-C, leaves a saved run.

    Raises:
      InputError, sharding.ShardingError: before anything is compiled or written.
      KernelMismatch: a kernel gives wrong numbers on this machine.
    """
    mesh = sharding.make_mesh(config.mesh.sizes)
    setup = prepare(config, mesh)
    report = f"{describe()}\n{cost_report(setup)}\n{choices(setup)}"
    check_loggers(config.logging)
    splits = _open_data(setup)
    data = data_fingerprint(config.data, splits)
    with contextlib.ExitStack() as stack:
        _claim(workdir, config, stack, overwrite=overwrite)
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
        _check_steps(config, first_step, profile_steps)
        positions = Positions(setup, checkpoints, data)
        with phases("restore" if checkpoints.steps() else "start"):
            position = positions.newest()
        ledger.begin(position.step)
        on_lead(lambda: _describe_run(workdir, config))
        anomalies = Anomalies(config.anomaly, setup.leaf_paths)
        anomalies.go_to(position.anomalies)
        reopen = functools.partial(_open_streams, setup, splits, workdir)
        writer, batches = reopen(position.step, anomalies.left_out)
        stack.callback(writer.close)
        stack.callback(batches.close)
        with phases("compile"):
            step, eval_step, check = _compile(setup, profile_steps)
        run = Run(
            setup=setup,
            positions=positions,
            anomalies=anomalies,
            reopen=reopen,
            writer=writer,
            batches=batches,
            step=step,
            eval_step=eval_step,
            check=check,
            poll=Poll(setup.mesh),
            stragglers=stack.enter_context(Stragglers(setup.mesh)),
            phases=phases,
            ledger=ledger,
            profiler=_profiler(workdir, step, phases, position.step, profile_steps),
            first_step=position.step,
            state=position.state,
        )
        stack.callback(run.close)
        phases.begin("other")
        try:
            yield run
        except (GeneratorExit, KeyboardInterrupt):
            run.save_newest()
            raise


def _claim(
    workdir: Path, config: Config, stack: contextlib.ExitStack, *, overwrite: bool
):
    on_lead(lambda: stack.enter_context(claim(workdir, config, overwrite=overwrite)))


def _profiler(
    workdir: Path, step: Compiled, phases: Phases, first_step: int, number: int
) -> Profiler:
    folder = workdir / FOLDER if is_lead() else None
    return Profiler(folder, step, phases, first=first_step + SKIPPED, number=number)


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


def _open_streams(
    setup: Setup,
    splits: Sequence[TokenSplit],
    workdir: Path,
    step: int,
    left_out: Sequence[int],
) -> tuple[MetricsWriter, Batches]:
    """Opens where numbers go and where batches come from, from a step on."""
    config = setup.config
    writer = MetricsWriter(
        workdir, config.logging, run_name=workdir.name, resume_step=step
    )
    batches = load_batches(
        config.data,
        splits,
        seed=config.seed,
        sharding=setup.abstract_batch["tokens"].sharding,
        start=step,
        left_out=left_out,
        vocab_size=config.model.vocab_size,
    )
    return writer, batches


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
    if setup.config.eval.every:
        eval_step = _timed("evaluation", compile_eval, setup)
    return step, eval_step, compile_check(setup)


def _timed(name: str, make: Callable[[Setup], Compiled], setup: Setup) -> Compiled:
    began_at_s = time.perf_counter()
    compiled = make(setup)
    _log.info("compiled the %s in %.1f s", name, time.perf_counter() - began_at_s)
    return compiled

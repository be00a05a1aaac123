# SPDX-License-Identifier: Apache-2.0
"""Replays one step of a run: its batch, its losses by row, its norms by layer.

python -m jaxllm.replay --workdir runs/x --step 1234 [--batch 1240]

Starts from the newest checkpoint at or before that step, and trains the steps between.
A batch that was left out belongs to no step: give its number too. Nothing is written.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags as absl_flags

import sharding
from jaxllm import flags
from jaxllm.checkpoint import Checkpoints
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.cluster import agreement, membership
from jaxllm.cluster.sameness import check_same
from jaxllm.config import Config
from jaxllm.data.batches import Batches, batch_of
from jaxllm.errors import InputError
from jaxllm.inspect.diagnosis import Diagnosis, diagnose
from jaxllm.plan.cost import choices
from jaxllm.run.anomalies import Anomalies
from jaxllm.run.compilation_cache import use_compilation_cache
from jaxllm.run.data import open_train_data
from jaxllm.run.saved_model import has_tokenizer, load_run_tokenizer
from jaxllm.run.saves import Saved, Saves
from jaxllm.step import Setup, compile_step, prepare
from jaxllm.step.bounds import place_bounds

SHOWN_ROWS = 5
SHOWN_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a batch: where it comes from, and its first tokens."""

    number: int
    loss: float
    place: str
    text: str


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step, as the devices were given it.

    Attributes:
      saved_step: of the checkpoint that the replay started from.
      rows: non-finite losses first, then the largest.
    """

    step: int
    batch: int
    saved_step: int
    diagnosis: Diagnosis
    rows: list[Row]


def replay(workdir: Path, config: Config, step: int, batch: int | None) -> Replay:
    """Trains from a checkpoint up to a step, and diagnoses that step.

    Args:
      workdir: of the run.
      config: of the run.
      step: to diagnose.
      batch: number of a batch to take instead of the step's own.

    Raises:
      InputError: the run has no such step, or other data.
    """
    if not 0 <= step < config.steps:
        raise InputError(
            f"--step={step} must be from 0 to config.steps={config.steps} less 1."
        )
    setup = prepare(config, sharding.make_mesh(config.mesh.sizes))
    choices(setup)  # refuses what this machine's devices cannot do
    data = open_train_data(setup)
    check_same(config, {"--step": step, "--batch": batch, **data.identity})
    with Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as checkpoints:
        saves = Saves(setup, checkpoints, data.fingerprint, data.eval_fingerprint)
        left_out = saves.left_out()
        saved = saves.up_to(step)
    with data.batches(saved.step, left_out) as batches:
        params = _params_at(setup, saved, batches, step)
    number = batch_of(step, left_out) if batch is None else batch
    with data.batches(number) as batches:
        diagnosis = diagnose(setup, params, next(batches))
        rows = list(_rows(workdir, config, batches, number, diagnosis))
    return Replay(step, number, saved.step, diagnosis, rows)


def _params_at(setup: Setup, saved: Saved, batches: Batches, step: int):
    """Returns the parameters before a step, which are those after the one before."""
    state = saved.state
    if saved.step == step:
        return state.params
    compiled = compile_step(setup)
    anomalies = Anomalies(setup.config.anomaly, setup.leaf_paths)
    anomalies.go_to(saved.anomalies)
    for now in range(saved.step, step):
        bounds = []
        if setup.config.anomaly.policy == "skip":
            bounds.append(place_bounds(anomalies.bounds(now), setup.mesh))
        state, metrics = compiled(state, next(batches), *bounds)
        values = jax.device_get(metrics)
        anomalies.judge({**values, "step": now}, batch=now)
    return state.params


def _rows(
    workdir: Path, config: Config, batches: Batches, batch: int, diagnosis: Diagnosis
) -> Iterator[Row]:
    """Yields the rows of non-finite losses, then of the largest ones."""
    losses = diagnosis.row_losses
    worth = np.where(np.isfinite(losses), losses, np.inf)
    worth[diagnosis.row_targets == 0] = -np.inf
    tokenizer = load_run_tokenizer(workdir, None) if has_tokenizer(workdir) else None
    for number in np.argsort(-worth, kind="stable")[:SHOWN_ROWS].tolist():
        found = batches.steps.find(batch * config.data.batch_size + number)
        assert found is not None, "training data has no end"
        path, row = found
        packed = batches.steps.packed[path]
        tokens = packed.read([row])["tokens"][0, :SHOWN_TOKENS].tolist()
        text = tokenizer.decode(tokens) if tokenizer else str(tokens)
        place = f"{packed.split.path} row {row}"
        yield Row(number, float(losses[number]), place, text)


def describe(replayed: Replay) -> str:
    """Returns a replay as lines of text."""
    found, diagnosis = replayed, replayed.diagnosis
    norm = math.sqrt(sum(np.square(g).sum() for g in diagnosis.gradients.values()))
    start = f"the save of step {found.saved_step}" if found.saved_step else "the start"
    lines = [
        f"step {found.step} with batch {found.batch}, from {start}",
        *(f"  {name} {value:.6g}" for name, value in diagnosis.means.items()),
        f"  grad_norm {norm:.6g}",
        "rows with the largest losses",
    ]
    for row in found.rows:
        lines.append(f"  row {row.number:<5} loss {row.loss:<10.6g} {row.place}")
        lines.append(f"    {row.text!r}")
    lines.append("residual stream, root mean square: of embeddings, after each layer")
    lines.append(f"  {_numbers(diagnosis.activations)}")
    lines.append("norms of gradients, for each layer from the first")
    width = max(map(len, diagnosis.gradients))
    for path, norms in diagnosis.gradients.items():
        lines.append(f"  {path:<{width}} {_numbers(norms)}")
    return "\n".join((*lines, _verdict(diagnosis)))


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _verdict(diagnosis: Diagnosis) -> str:
    is_bad = ~np.isfinite(diagnosis.row_losses) & (diagnosis.row_targets > 0)
    bad_rows = np.flatnonzero(is_bad).tolist()
    bad_layers = np.flatnonzero(~np.isfinite(diagnosis.activations)).tolist()
    bad = [p for p, g in diagnosis.gradients.items() if not np.isfinite(g).all()]
    faults = []
    if diagnosis.means["num_targets"] and not math.isfinite(diagnosis.means["loss"]):
        faults.append("the loss")
    if bad_rows:
        faults.append(f"the loss of {len(bad_rows)} rows, first {bad_rows[0]}")
    if bad_layers:
        where = f"after layer {bad_layers[0] - 1}" if bad_layers[0] else "of embeddings"
        faults.append(f"the residual stream, first {where}")
    if bad:
        faults.append(f"the gradient of {len(bad)} parameters, first {bad[0]}")
    return f"not finite: {'; '.join(faults)}" if faults else "all of it is finite"


def main(argv: list[str]):
    del argv
    config, workdir = flags.config_from_flags(), flags.workdir_from_flags()
    values = absl_flags.FLAGS
    if values.step is None:
        raise InputError("--step is missing; give the number of a step.")
    membership.join(config.distributed)
    use_compilation_cache()
    found = replay(workdir, config, values.step, values.batch)
    if agreement.is_lead():
        print(describe(found))


if __name__ == "__main__":
    flags.define_config_flags()
    absl_flags.DEFINE_integer("step", None, "step to repeat", lower_bound=0)
    absl_flags.DEFINE_integer(
        "batch", None, "batch to use instead of the step's own", lower_bound=0
    )
    flags.run(main)

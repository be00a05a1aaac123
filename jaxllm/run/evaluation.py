# SPDX-License-Identifier: Apache-2.0
"""The loss on held-out tokens, of a training run or of one of its checkpoints."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sharding
from jaxllm.config import Config
from jaxllm.plan.cost import choices
from jaxllm.run.data import open_eval_batches
from jaxllm.run.saved_model import Which, load_params
from jaxllm.step import compile_eval, prepare


def evaluate(
    eval_step: jax.stages.Compiled, params: Any, batches: Iterable
) -> dict[str, float]:
    """Returns the mean negative log-likelihood over all targets of batches.

    Args:
      eval_step: from `compile_eval`.
      batches: from `open_eval_batches`.
    """
    sums = []
    for batch in batches:
        sums.append(eval_step(params, batch))
        # No more than two wait for the devices: batches need memory, and whoever looks
        # on sees that one after the other is done.
        jax.block_until_ready(sums[-2:-1])
    # Added on the host in float64: the mean must not depend on how many batches
    # there are.
    nll, num_targets = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
    return {"eval_loss": float(nll / num_targets)}


def evaluate_run(workdir: Path, config: Config, which: Which) -> dict[str, float]:
    """Returns the step of a checkpoint and its loss on held-out tokens."""
    mesh = sharding.make_mesh(config.mesh.sizes)
    setup = prepare(config, mesh)
    choices(setup)  # refuses what this machine's devices cannot do
    with open_eval_batches(setup) as batches:
        params = setup.abstract_state.params
        step, params = load_params(workdir, config, which, params)
        return {"step": step, **evaluate(compile_eval(setup), params, batches)}

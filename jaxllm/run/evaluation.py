# SPDX-License-Identifier: Apache-2.0
"""The loss on held-out tokens, of a training run or of one of its checkpoints."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sharding
from jaxllm.cluster.sameness import check_same
from jaxllm.config import Config
from jaxllm.plan.cost import choices
from jaxllm.plan.room import check_parameters
from jaxllm.run.data import open_run_data
from jaxllm.run.saved_model import Which, load_params
from jaxllm.step import compile_eval, prepare


def evaluate(
    eval_step: jax.stages.Compiled, params: Any, batches: Iterable
) -> dict[str, float]:
    """Returns the mean negative log-likelihood over all targets of batches.

    Args:
      eval_step: from `compile_eval`.
      batches: from `RunData.eval_batches`.
    """
    sums = []
    for batch in batches:
        sums.append(eval_step(params, batch))
        # No more than two wait for the devices: batches need memory, and whoever looks
        # on sees that one after the other is done.
        jax.block_until_ready(sums[-2:-1])
    # Added on the host in float64: the mean must not depend on how many batches
    # there are.
    sums = jax.device_get(sums)
    nll = np.sum([each["nll"] for each in sums], dtype=np.float64)
    num_targets = sum(int(each["num_targets"]) for each in sums)
    return {"eval_loss": float(nll) / num_targets if num_targets else math.nan}


def evaluate_run(workdir: Path, config: Config, which: Which) -> dict[str, float]:
    """Returns the step of a checkpoint and its loss on held-out tokens."""
    mesh = sharding.make_mesh(config.mesh.sizes)
    setup = prepare(config, mesh)
    check_parameters(setup)
    choices(setup)  # refuses what this machine's devices cannot do
    data = open_run_data(setup)
    check_same(config, {"--step": which, **data.identity})
    with data.eval_batches() as batches:
        params = setup.abstract_state.params
        step, params = load_params(workdir, config, which, params)
        return {"step": step, **evaluate(compile_eval(setup), params, batches)}

# SPDX-License-Identifier: Apache-2.0
"""The loss on held-out tokens, of a run under way or of a saved step."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sharding
from jaxllm.config import Config
from jaxllm.data.batches import Batches, eval_batches
from jaxllm.data.splits import check_vocab, open_splits
from jaxllm.plan.cost import choices
from jaxllm.run.saved_model import Which, load_params
from jaxllm.step import Setup, compile_eval, prepare


def evaluate(
    eval_step: jax.stages.Compiled, params: Any, batches: Iterable
) -> dict[str, float]:
    """Returns the mean negative log-likelihood over all targets of batches.

    Args:
      eval_step: from `compile_eval`.
      batches: from `held_out`.
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


def held_out(setup: Setup) -> Batches:
    """Returns the batches of an evaluation: the same ones at every call.

    Raises:
      InputError: there are no held-out tokens, or the training data has them too.
    """
    data, vocab_size = setup.config.data, setup.config.model.vocab_size
    splits = open_splits(data, "eval")
    check_vocab(splits, vocab_size)
    return eval_batches(
        data,
        splits,
        sharding=setup.abstract_batch["tokens"].sharding,
        num_batches=setup.config.eval.batches,
        vocab_size=vocab_size,
    )


def evaluate_run(workdir: Path, config: Config, which: Which) -> dict[str, float]:
    """Returns a saved step of a run and its loss on held-out tokens."""
    mesh = sharding.make_mesh(config.mesh.sizes)
    setup = prepare(config, mesh)
    choices(setup)  # refuses what this machine's devices cannot do
    with held_out(setup) as batches:
        params = setup.abstract_state.params
        step, params = load_params(workdir, config, which, params)
        return {"step": step, **evaluate(compile_eval(setup), params, batches)}

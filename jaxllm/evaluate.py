# SPDX-License-Identifier: Apache-2.0
"""Measures a run's loss on held-out tokens.

python -m jaxllm.evaluate --workdir runs/x [--step best] [--config.eval.batches=0]
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags

import sharding
from jaxllm import flags
from jaxllm.cluster import agreement, membership
from jaxllm.config import Config
from jaxllm.data.batches import Batches, eval_batches
from jaxllm.data.splits import check_vocab, open_splits
from jaxllm.plan.cost import choices
from jaxllm.savedrun import Which, load_params, read_step
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


def main(argv: list[str]):
    del argv
    config, workdir = flags.config_from_flags(), flags.workdir_from_flags()
    which = read_step(absl_flags.FLAGS.step)
    membership.join(config.distributed)
    result = evaluate_run(workdir, config, which)
    if agreement.is_lead():
        print(json.dumps(result))


if __name__ == "__main__":
    flags.define_config_flags()
    absl_flags.DEFINE_string("step", "latest", "save to evaluate: N, latest or best")
    flags.run(main)

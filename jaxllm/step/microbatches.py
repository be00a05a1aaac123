# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation over microbatches."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import sharding
from jaxllm.models.pipeline import split


def add_microbatches(
    gradient: Callable, params: Any, batch: Mapping[str, jax.Array], num_parts: int
) -> tuple[Any, Any]:
    """Returns the sums over microbatches of the gradient and of the metrics.

    Each replica along `data` accumulates its own; one all-reduce a step adds them.

    Args:
      gradient: takes params and a batch; returns the gradient of a sum, and sums.
      params: placed by STORAGE.
      batch: of global arrays, BT.
      num_parts: microbatches, as `split` takes them apart.
    """

    def run(params, batch):
        def add(total, part):
            grads, sums = gradient(params, part)
            return jax.tree.map(jnp.add, total, grads), sums

        zero = jax.tree.map(jnp.zeros_like, params)
        parts = {name: split(rows_BT, num_parts) for name, rows_BT in batch.items()}
        grads, sums = jax.lax.scan(add, zero, parts)
        return grads, jax.tree.map(jnp.sum, sums)

    def run_replica(params, batch):
        return jax.lax.psum(run(params, batch), "data")

    if "data" not in sharding.axes_of("B"):
        return run(params, batch)
    ins = jax.P(), jax.P("data")
    return sharding.along("data", run_replica, ins, jax.P())(params, dict(batch))

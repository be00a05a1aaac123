# SPDX-License-Identifier: Apache-2.0
"""Diagnosis of one step: its losses by row, its norms by layer and by parameter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.step import Batch, Setup, forward, gradients, in_zigzag
from jaxllm.step.loss import row_losses


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Losses and norms of one batch with given parameters.

    Attributes:
      means: over the batch's targets, as in the metrics: `loss`, `objective`, ...
      gradients: gradient norm of each parameter, one for each layer stacked in it.
      activations: root mean square of the residual stream: of the embeddings, then
        after each layer.
      row_losses: mean over a row's targets; NaN where it has none.
      row_targets: number of a row's targets.
    """

    means: dict[str, float]
    gradients: dict[str, np.ndarray]
    activations: np.ndarray
    row_losses: np.ndarray
    row_targets: np.ndarray


def diagnose(setup: Setup, params: Any, batch: Batch) -> Diagnosis:
    """Returns losses and norms of a batch, without an update.

    A forward pass for each layer, with those above it switched off, finds the layer
    after which the residual stream is not finite.
    """
    with jax.set_mesh(setup.mesh):
        means, norms = jax.jit(lambda p, b: _gradient_norms(setup, p, b))(params, batch)
        sums_B = jax.jit(lambda p, b: _row_sums(setup, p, b))(params, batch)
        stream = jax.jit(lambda p, b, depth: _stream(setup, p, b, depth))
        depths = [jnp.int32(d) for d in range(setup.config.model.num_layers + 1)]
        activations = [stream(params, batch, depth) for depth in depths]
        counts_B = jax.jit(_counts)(batch)
    nll_B, num_targets_B = jax.device_get((sums_B, counts_B))
    with np.errstate(invalid="ignore"):
        losses = nll_B / num_targets_B
    names = setup.leaf_paths
    return Diagnosis(
        means={name: float(value) for name, value in jax.device_get(means).items()},
        gradients=dict(zip(names, jax.device_get(norms), strict=True)),
        activations=np.array(jax.device_get(activations)),
        row_losses=losses,
        row_targets=num_targets_B,
    )


def _gradient_norms(setup: Setup, params: Any, batch: Batch):
    grads, means = gradients(setup, params, batch)
    norms = []
    for gradient, row in zip(jax.tree.leaves(grads), setup.plan.rows, strict=True):
        stacked = row.letters.startswith("L")
        layers = gradient.shape[0] if stacked else 1
        axes = tuple(range(int(stacked), gradient.ndim))
        norms.append(jnp.sqrt(jnp.square(gradient).sum(axes)).reshape(layers))
    return means, norms


def _row_sums(setup: Setup, params: Any, batch: Batch) -> jax.Array:
    batch = in_zigzag(batch)
    model = setup.model.bind(params)
    x_BTD, _ = forward(setup, model, batch)
    w, letters = model.output_weights()
    loss = setup.loss(letters)
    return _everywhere(row_losses(x_BTD, w, batch["targets"], loss))


def _counts(batch: Batch) -> jax.Array:
    return _everywhere((batch["targets"] >= 0).sum(1))


def _stream(setup: Setup, params: Any, batch: Batch, depth: jax.Array) -> jax.Array:
    """Returns the root mean square of the residual stream after so many layers.

    A layer whose parameters are all 0 adds nothing to it.
    """
    leaves, tree = jax.tree.flatten(params)
    rows = setup.plan.rows
    kept = [
        _below(depth, leaf, row.path, row.letters, setup.config.model)
        for leaf, row in zip(leaves, rows, strict=True)
    ]
    model = setup.model.bind(jax.tree.unflatten(tree, kept))
    x_BTD, _ = forward(setup, model, in_zigzag(batch), final_norm=False)
    return jnp.sqrt(jnp.square(x_BTD.astype(jnp.float32)).mean())


def _below(
    depth: jax.Array, leaf: jax.Array, path: str, letters: str, model: ModelConfig
):
    """Returns a parameter with 0 in the layers from `depth` on."""
    part, *rest = path.split("/")
    if part not in ("leading", "blocks"):
        return leaf
    before = len(model.leading) if part == "blocks" else 0
    layer = jnp.int32(rest[0]) + before
    if letters.startswith("L"):  # the n-th of these blocks is in the n-th period
        layer += len(model.period) * jnp.arange(leaf.shape[0], dtype=jnp.int32)
        layer = layer.reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.where(layer < depth, leaf, jnp.zeros_like(leaf))


def _everywhere(values_B: jax.Array) -> jax.Array:
    return jax.sharding.reshard(values_B, jax.P())

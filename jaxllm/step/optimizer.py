# SPDX-License-Identifier: Apache-2.0
"""The optimizer and the learning rate's schedule, from their settings.

Every optimizer is the same chain: clip the global norm of the gradient, scale it (the
only difference between them), add the decoupled weight decay, multiply by -lr. All
state is float32, as the parameters are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.config import OptimizerConfig
from jaxllm.errors import InputError
from jaxllm.step.adafactor import scale_by_adafactor
from jaxllm.step.muon import has_muon, is_matrix, orthogonalize

Axes = Any  # tree like the parameters, with their letters as leaves
Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Returns the learning rate as a function of the number of updates made before.

    It rises by lr / warmup_steps a step, so the first update has that and update number
    warmup_steps has lr. Then it falls, towards final_lr_fraction * lr after `steps`
    updates: as half a cosine, in a line, not at all, or (wsd) in a line during the
    last decay_fraction of the steps.
    """
    warmup = config.warmup_steps
    decay_start = warmup
    if config.schedule == "wsd":
        decay_start = max(warmup, steps - round(config.decay_fraction * steps))

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = (step - decay_start) / max(steps - decay_start, 1)
        progress = jnp.clip(progress, 0.0, 1.0)
        if config.schedule == "constant":
            left = jnp.ones_like(progress)
        elif config.schedule == "cosine":
            left = 0.5 + 0.5 * jnp.cos(jnp.pi * progress)
        else:
            left = 1 - progress
        final = config.final_lr_fraction
        decayed = final + (1 - final) * left
        rising = (step + 1) / max(warmup, 1)
        return config.lr * jnp.where(step < warmup, rising, decayed)

    return schedule


def make_optimizer(
    config: OptimizerConfig, steps: int, axes: Axes, *, balance_step: float = 0.0
) -> optax.GradientTransformation:
    """Returns the Optax transformation of a config.

    Its state does not change shape with lr, weight_decay or clip_norm, which may differ
    when a run is resumed. On a mesh with Explicit axes, `init` and `update` must run
    under `jax.sharding.auto_axes`.

    Args:
      config: the settings. b2 is not used by muon's matrices, adafactor and sgd; b1 not
        by adafactor; eps not by lion and sgd.
      steps: length of the run, for the schedule.
      axes: the letters of each parameter ("LDNH"), in a tree like the parameters.
      balance_step: what the bias of an overloaded expert loses in an update.
    """
    trained = _train(config, steps, axes)
    if not any(map(is_load_bias, jax.tree.leaves(axes))):
        return trained
    balance = optax.stateless(
        lambda updates, _: jax.tree.map(lambda g: -balance_step * jnp.sign(g), updates)
    )
    return optax.partition(
        {"trained": trained, "balance": balance},
        jax.tree.map(lambda x: "balance" if is_load_bias(x) else "trained", axes),
    )


def is_load_bias(letters: str) -> bool:
    """Returns whether a parameter is a router's bias: its gradient is a load error."""
    return "R" in letters and "D" not in letters


def _train(
    config: OptimizerConfig, steps: int, axes: Axes
) -> optax.GradientTransformation:
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        _scaling(config, axes),
        optax.add_decayed_weights(config.weight_decay, jax.tree.map(is_matrix, axes)),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )


def muon_parameters(axes: Axes) -> list[str]:
    """Returns the paths of the parameters that Muon takes: every matrix without V.

    The embedding, the output projection, biases and norms have AdamW.
    """
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, letters in jax.tree.leaves_with_path(axes)
        if has_muon(letters)
    ]


def _scaling(config: OptimizerConfig, axes: Axes) -> optax.GradientTransformation:
    b1, b2, eps = config.b1, config.b2, config.eps
    match config.name:
        case "adamw":
            return optax.scale_by_adam(b1, b2, eps)
        case "muon":
            return _scale_by_muon(config, axes)
        case "adafactor":
            # The tree that partition passes on has no biases of routers.
            taken = jax.tree.map(
                lambda x: optax.MaskedNode() if is_load_bias(x) else x, axes
            )
            return scale_by_adafactor(taken, eps)
        case "lion":
            return optax.scale_by_lion(b1, b2)
        case "sgd":
            return optax.trace(b1)


def _scale_by_muon(config: OptimizerConfig, axes: Axes) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, AdamW for the rest.

    Source: Liu et al., "Muon is Scalable for LLM Training" (arXiv:2502.16982).
    """
    # The tree that partition passes on has such a node for every other parameter.
    taken = jax.tree.map(lambda x: x if has_muon(x) else optax.MaskedNode(), axes)
    if not jax.tree.leaves(taken):
        raise InputError(
            "config.optimizer.name=muon finds no matrix to take, only embeddings and "
            "vectors; use config.optimizer.name=adamw."
        )
    muon = optax.chain(
        optax.trace(config.b1, nesterov=True),
        optax.stateless(lambda updates, _: jax.tree.map(orthogonalize, updates, taken)),
    )
    return optax.partition(
        {"muon": muon, "adamw": optax.scale_by_adam(config.b1, config.b2, config.eps)},
        jax.tree.map(lambda x: "muon" if has_muon(x) else "adamw", axes),
    )

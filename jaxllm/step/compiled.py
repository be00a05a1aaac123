# SPDX-License-Identifier: Apache-2.0
"""The compiled functions of a run: update, evaluation, check for finite numbers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sharding
from jaxllm.models import Transformer
from jaxllm.models.pipeline import split
from jaxllm.step.bounds import abstract_bounds, is_within, select
from jaxllm.step.loss import next_token_loss
from jaxllm.step.microbatches import add_microbatches
from jaxllm.step.optimizer import is_load_bias, make_schedule
from jaxllm.step.setup import Setup, TrainState, specs_of

Batch = Mapping[str, jax.Array]  # of BATCH_NAMES: int32 [B, T]
Sums = dict[str, jax.Array]  # float32 []

OVER_TARGETS = ("objective", "loss")  # means over targets; all others are over tokens


def compile_step(
    setup: Setup, options: Mapping[str, str] | None = None
) -> jax.stages.Compiled:
    """Compiles (state, batch) -> (state, metrics) ahead of time; donates the state.

    With config.anomaly.policy "skip" it takes `bounds` too. A step beyond them, or not
    finite, leaves parameters and moments as they were, and 1 in the metric `skipped`.

    Metrics are float32: `loss` is the mean negative log-likelihood of the batch's
    targets, `objective` adds z-loss and what balances experts, `grad_norm` is before
    clipping; `leaf_norms` has the gradient norm of each parameter, in the order of
    `jax.tree.leaves`; the statistics of `route`, if any, begin with "router_" and are
    means over tokens. Without anything to average, a mean is NaN. `num_targets` is
    int32.

    Args:
      setup: of the run.
      options: of XLA, for this program.
    """
    trained = [not is_load_bias(row.letters) for row in setup.plan.rows]
    schedule = make_schedule(setup.config.optimizer, setup.config.steps)
    specs = specs_of(setup.abstract_state)
    # Optax contracts and promotes without saying how: automatic axes, loose dtypes.
    update = jax.numpy_dtype_promotion("standard")(
        jax.sharding.auto_axes(
            setup.optimizer.update, out_sharding=(specs.params, specs.opt_state)
        )
    )

    def train_step(state: TrainState, batch: Batch, bounds: jax.Array | None = None):
        grads, means = gradients(setup, state.params, batch)
        with jax.named_scope("optimizer"):
            leaf_norms = jnp.stack([jnp.linalg.norm(g) for g in jax.tree.leaves(grads)])
            updates, opt_state = update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            **means,
            "grad_norm": jnp.linalg.norm(leaf_norms * jnp.array(trained, jnp.float32)),
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
            "leaf_norms": leaf_norms,
        }
        if bounds is not None:
            taken = is_within(bounds, metrics)
            params = select(taken, params, state.params)
            opt_state = select(taken, opt_state, state.opt_state)
            metrics["skipped"] = 1 - taken.astype(jnp.float32)
        return TrainState(state.step + 1, params, opt_state), metrics

    inputs = [setup.abstract_state, setup.abstract_batch]
    if setup.config.anomaly.policy == "skip":
        inputs.append(abstract_bounds(setup.mesh))
    with jax.set_mesh(setup.mesh):
        step = jax.jit(train_step, donate_argnums=0)
        compiler_options = dict(options) if options else None
        return step.lower(*inputs).compile(compiler_options)


def compile_eval(setup: Setup) -> jax.stages.Compiled:
    """Compiles (params, batch) -> sums: float32 `nll` and int32 `num_targets`."""

    def eval_step(params, batch: Batch):
        nll = _loss_sums(setup, params, in_zigzag(batch))["loss"]
        return {"nll": nll, "num_targets": (batch["targets"] >= 0).sum()}

    with jax.set_mesh(setup.mesh):
        params = setup.abstract_state.params
        return jax.jit(eval_step).lower(params, setup.abstract_batch).compile()


def compile_check(setup: Setup) -> jax.stages.Compiled:
    """Compiles state -> bool [n]: which of its n leaves are finite."""

    def check(state: TrainState):
        leaves = jax.tree.leaves(state)
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])

    with jax.set_mesh(setup.mesh):
        return jax.jit(check).lower(setup.abstract_state).compile()


def gradients(setup: Setup, params: Any, batch: Batch) -> tuple[Any, Sums]:
    """Returns the gradient of the mean objective over targets, and the mean metrics.

    Of a batch without targets the gradient is 0 and the means over targets are NaN.
    """
    num_targets = (batch["targets"] >= 0).sum()
    num_tokens = (batch["segments"] > 0).sum()
    grads, sums = _accumulate(setup, params, in_zigzag(batch))
    means = {
        name: value * _inverse(num_targets if name in OVER_TARGETS else num_tokens)
        for name, value in sums.items()
    }
    scale = jnp.where(num_targets > 0, _inverse(num_targets), 0.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    return grads, {**means, "num_targets": num_targets}


def _inverse(count: jax.Array) -> jax.Array:
    """Returns 1 / count as float32; NaN for none."""
    return jnp.where(count > 0, 1 / jnp.maximum(count, 1).astype(jnp.float32), jnp.nan)


def in_zigzag(batch: Batch) -> Batch:
    """Returns the batch in zig-zag order, which context parallelism shards."""
    return dict(zip(batch, sharding.to_zigzag(*batch.values()), strict=True))


def forward(
    setup: Setup, model: Transformer, batch: Batch, *, final_norm: bool = True
) -> tuple[jax.Array, Sums]:
    """Returns the model's x_BTD, and statistics of its experts.

    Args:
      setup: of the run.
      model: with its parameters.
      batch: in zig-zag order.
      final_norm: False returns the residual stream as it is.
    """
    mixed = setup.config.data.cross_document_attention
    x_BTD, _, stats = model.run(
        batch["tokens"],
        batch["positions"],
        None if mixed else batch["segments"],
        is_token_BT=batch["segments"] > 0,
        schedule=setup.schedule,
        final_norm=final_norm,
    )
    return x_BTD, stats


def _loss_sums(setup: Setup, params: Any, batch: Batch) -> Sums:
    """Returns `objective` and `loss`, sums over the batch's targets, and statistics,
    sums over its tokens."""
    model = setup.model.bind(params)
    x_BTD, stats = forward(setup, model, batch)
    w, letters = model.output_weights()
    with jax.named_scope("loss"):
        objective, nll = next_token_loss(
            x_BTD,
            w,
            batch["targets"],
            setup.loss(letters),
        )
    # Means over a microbatch; the penalty is one of its objective's, over targets.
    num_targets_M = _count_each(setup, batch["targets"] >= 0)
    num_tokens_M = _count_each(setup, batch["segments"] > 0)
    sums = {
        name: (value * (num_targets_M if name == "penalty" else num_tokens_M)).sum()
        for name, value in stats.items()
    }
    objective += sums.pop("penalty", 0.0)
    return {"objective": objective, "loss": nll, **sums}


def _count_each(setup: Setup, is_one_BT: jax.Array) -> jax.Array:
    """Returns how many are true in each microbatch of the schedule, as float32."""
    parts = setup.schedule.num_microbatches if setup.schedule else 1
    return split(is_one_BT, parts).sum((1, 2)).astype(jnp.float32)


def _accumulate(setup: Setup, params: Any, batch: Batch):
    """Returns the gradient of the summed objective, and all sums: float32."""

    def loss(params, batch):
        sums = _loss_sums(setup, params, batch)
        return sums["objective"], sums

    gradient = jax.grad(loss, has_aux=True)
    parts = setup.config.optimizer.microbatches
    if parts == 1 or setup.schedule:
        # One: replicas add up a layer's gradients while those of the next are made.
        # A schedule: the model takes the microbatches apart.
        return gradient(params, batch)
    return add_microbatches(gradient, params, batch, parts)

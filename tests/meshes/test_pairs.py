# SPDX-License-Identifier: Apache-2.0
"""The same run on any mesh: 8 simulated devices against one."""

import functools

import jax
import jax.numpy as jnp
import pytest

from courses import (
    DATA,
    LOSS_TOLERANCE,
    ONE_DEVICE,
    STEPS,
    WORDS,
    changed,
    check_equal,
    packed_batch,
    train,
)
from jaxllm.config import Config, LossConfig, ModelConfig, OptimizerConfig
from jaxllm.models import Model
from jaxllm.step import Setup, TrainState
from jaxllm.step.loss import Loss, next_token_loss

ALL = "data 2 x fsdp 2 x tensor 2"
MESHES = [
    ALL,
    *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("data 8", "fsdp 8")),
    pytest.param("tensor 2 x fsdp 4", marks=pytest.mark.slow),
]

# A window, grouped queries, qk-norm, biases and both soft-caps: all that has to be cut.
MODEL = ModelConfig(
    vocab_size=WORDS,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    bias="all",
    qk_norm=True,
    windows=(8,),
    attention_softcap=20.0,
    logit_softcap=30.0,
    dtype="float32",
)


def config(optimizer: str = "adamw") -> Config:
    return Config(
        steps=STEPS,
        model=MODEL,
        data=DATA,
        loss=LossConfig(z_loss=1e-3, chunk_tokens=24),
        optimizer=OptimizerConfig(
            name=optimizer,  # pyright: ignore[reportArgumentType]
            lr=3e-3,
            warmup_steps=4,
            weight_decay=0.1,
            microbatches=2,
        ),
    )


def first_state(mesh: str, setup: Setup) -> TrainState:
    """Starts from the parameters of the AdamW run: to draw them compiles for long."""
    tree = jax.tree.structure(setup.model.abstract)
    params = jax.tree.unflatten(tree, train(config(), mesh).initial.values())
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, setup.abstract_state)
    init = jax.sharding.auto_axes(setup.optimizer.init, out_sharding=specs.opt_state)
    with jax.set_mesh(setup.mesh):
        params = jax.device_put(params, setup.plan.shardings(params))
        return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(init)(params))


@pytest.mark.parametrize("mesh", MESHES)
def test_the_initial_parameters_are_bitwise_the_same_on_every_mesh(mesh):
    assert changed(train(config(), ONE_DEVICE), train(config(), mesh)) == []


@pytest.mark.parametrize("mesh", MESHES)
def test_the_losses_of_20_steps_are_the_same_on_every_mesh(mesh):
    check_equal(mesh, train(config(), ONE_DEVICE), train(config(), mesh))


# Newton-Schulz multiplies the rounding of small singular values (3.4**5 = 460 times at
# most), Adafactor divides by a mean over fewer numbers: both stay below the same bound.
@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_other_optimizers_keep_the_losses_of_one_device_too(optimizer):
    one, many = (
        train(config(optimizer), mesh, functools.partial(first_state, mesh))
        for mesh in (ONE_DEVICE, ALL)
    )
    check_equal(optimizer, one, many)


def test_a_call_without_a_mesh_gives_the_loss_of_one_device():
    course = train(config(), ONE_DEVICE)
    model = Model(MODEL)
    tree = jax.tree.structure(model.abstract)
    params = jax.tree.unflatten(tree, course.initial.values())
    batch = jax.tree.map(jnp.asarray, jax.device_get(packed_batch(course.setup, 0)))

    @jax.jit
    def mean_loss(params):
        module = model.bind(params)
        x_BTD, _ = module(batch["tokens"], batch["positions"], batch["segments"])
        w, letters = module.output_weights()
        loss = Loss(letters, MODEL.logit_softcap, LossConfig())
        nll = next_token_loss(x_BTD, w, batch["targets"], loss)[1]
        return nll / (batch["targets"] >= 0).sum().astype(jnp.float32)

    assert jax.sharding.get_abstract_mesh().empty
    loss = float(mean_loss(params))
    assert loss == pytest.approx(course.metrics["loss"][0], rel=LOSS_TOLERANCE)

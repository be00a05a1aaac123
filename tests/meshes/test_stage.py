# SPDX-License-Identifier: Apache-2.0
"""The same run with its layers cut over `stage`: 8 simulated devices against one."""

import collections
import re

import jax
import numpy as np
import pytest

from courses import (
    DATA,
    LENGTH,
    LOSS_TOLERANCE,
    ONE_DEVICE,
    ROWS,
    STEPS,
    WORDS,
    Trained,
    changed,
    check_equal,
    difference,
    packed_batch,
    train,
)
from jaxllm.config import Config, LossConfig, ModelConfig, OptimizerConfig, override
from jaxllm.inspect.collectives import read_collectives
from jaxllm.step import compile_eval

CONFIG = Config(
    steps=STEPS,
    model=ModelConfig(
        vocab_size=WORDS,
        num_layers=4,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=48,
        attention_softcap=20.0,
        logit_softcap=30.0,
        dtype="float32",
    ),
    data=DATA,
    loss=LossConfig(z_loss=1e-3, chunk_tokens=24),
    optimizer=OptimizerConfig(
        lr=3e-3, warmup_steps=4, weight_decay=0.1, microbatches=4
    ),
)
MODELS = {
    # Periods of two windows, tied embeddings.
    "dense": {
        "model.num_layers": 8,
        "model.windows": (8, 0),
        "model.tie_embeddings": True,
    },
    "experts": {
        "model.moe.num_experts": 4,
        "model.moe.balance": "bias",
        "model.moe.balance_weight": 1e-3,
        "model.moe.router_z_loss": 1e-3,
    },
}


# By mesh: settings that do not change a result.
MESHES = {
    "stage 2 x fsdp 2 x tensor 2": {"mesh.stage": 2, "mesh.stage_rounds": 2},
    "stage 2 x context 2 x expert 2": {
        **{"mesh.stage": 2, "mesh.stage_rounds": 2},
        **{"model.remat": "dots"},
    },
    "stage 4 x data 2": {"mesh.stage": 4, "model.remat": "none"},
}
every_mesh = pytest.mark.parametrize(
    "mesh",
    [*list(MESHES)[:2], pytest.param("stage 4 x data 2", marks=pytest.mark.slow)],
)


def one_and_many(mesh: str) -> tuple[Trained, Trained]:
    """Returns what one device and a mesh with stages make of the same model."""
    config = override(CONFIG, MODELS["experts" if "expert" in mesh else "dense"])
    many = override(config, {"model.remat": "full"} | MESHES[mesh])
    return train(config, ONE_DEVICE), train(many, mesh)


@every_mesh
def test_20_steps_are_those_of_one_device(mesh):
    one, many = one_and_many(mesh)
    assert changed(one, many) == []
    check_equal(mesh, one, many)
    for name in one.metrics:
        if name.startswith("router"):
            assert difference(one, many, name).max() < LOSS_TOLERANCE, name


@pytest.mark.parametrize("mesh", list(MESHES)[:2])
def test_the_gradient_of_every_parameter_is_that_of_one_device(mesh):
    one, many = (c.metrics["leaf_norms"][0] for c in one_and_many(mesh))
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-7)


def test_an_evaluation_has_the_loss_of_the_step():
    _, course = one_and_many("stage 2 x fsdp 2 x tensor 2")
    places = course.setup.plan.shardings(course.state.params)
    tree = jax.tree.structure(course.state.params)
    params = jax.tree.unflatten(tree, course.initial.values())
    evaluate = compile_eval(course.setup)
    batch = packed_batch(course.setup, 0)
    sums = jax.device_get(evaluate(jax.device_put(params, places), batch))
    nll, num_targets = sums["nll"], sums["num_targets"]
    assert num_targets == course.metrics["num_targets"][0]
    assert nll / num_targets == pytest.approx(course.metrics["loss"][0], rel=1e-6)


def length_of_device(mesh: jax.sharding.Mesh) -> int:
    return LENGTH // mesh.shape["tensor"] // mesh.shape["context"]


def test_a_step_sends_what_its_schedule_says():
    _, course = one_and_many("stage 2 x fsdp 2 x tensor 2")
    schedule, mesh = course.setup.schedule, course.setup.mesh
    assert schedule is not None
    text = course.step.as_text()
    assert text is not None
    found = collections.Counter()
    for sent in read_collectives(text, mesh):
        if sent.axes == ("stage",):
            for array in sent.arrays:
                place = "loop" if sent.loop else "step"
                found[sent.kind, place, array] += sent.count or 1
    rows = ROWS // schedule.num_microbatches // mesh.shape["fsdp"]
    microbatch = f"{rows},{length_of_device(mesh)},{CONFIG.model.d_model}]"
    # Forward and backward, from one stage to the next.
    in_loop = {key: n for key, n in found.items() if key[1] == "loop"}
    assert in_loop == {
        ("collective-permute", "loop", f"f32[{microbatch}"): 2 * schedule.num_ticks
    }
    # The output to all stages; the input's gradient from the first.
    batch = f"f32[{schedule.num_microbatches},{microbatch}"
    assert found["all-reduce", "step", batch] == 2
    # One of two moves leaves layers where they are; each parameter, then its gradient.
    exchanged = [
        n for key, n in found.items() if key[:2] == ("collective-permute", "step")
    ]
    layers = [path for path in course.initial if path.startswith("blocks/")]
    assert sum(exchanged) == 2 * len(layers)


@every_mesh
def test_no_tick_keeps_a_copy_of_layers(mesh):
    _, course = one_and_many(mesh)
    schedule = course.setup.schedule
    assert schedule is not None
    text = course.step.as_text()
    assert text is not None
    kept = set(re.findall(rf"f32\[{schedule.num_ticks},([\d,]+)\]", text))
    kept_x = f",{length_of_device(course.setup.mesh)},{CONFIG.model.d_model}"
    assert any(shape.endswith(kept_x) for shape in kept)
    for leaf in jax.tree.leaves(course.setup.abstract_state.params["blocks"]):
        stored, *rest = leaf.sharding.shard_shape(leaf.shape)
        if len(rest) > 1:
            dims = ",".join(map(str, rest))
            assert kept.isdisjoint({dims, f"{stored // schedule.num_rounds},{dims}"})

# SPDX-License-Identifier: Apache-2.0
"""The same run with its layers cut over `stage`: 8 simulated devices against one."""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

import sharding
from jaxllm.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
)
from jaxllm.configfile import override
from jaxllm.step import (
    Setup,
    TrainState,
    compile_eval,
    compile_step,
    init_state,
    prepare,
)

STEPS, ROWS, LENGTH, WORDS = 20, 16, 32, 96
LAYERS = 8
LOSS_TOLERANCE = 1e-6  # as in test_meshes.py
# As there, of the roundings of tokens, steps and layers.
NORM_TOLERANCE = float(
    np.finfo(np.float32).eps * np.sqrt(ROWS * LENGTH * STEPS * LAYERS)
)
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
    data=DataConfig(paths=("none",), sequence_length=LENGTH, batch_size=ROWS),
    loss=LossConfig(z_loss=1e-3, chunk_tokens=24),
    optimizer=OptimizerConfig(
        lr=3e-3, warmup_steps=4, weight_decay=0.1, microbatches=4
    ),
)
MODELS = {
    # Periods of two windows, tied embeddings.
    "dense": {
        "model.num_layers": LAYERS,
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


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh, and what does not change a result."""

    sizes: dict[str, int]
    rounds: int = 1
    remat: str = "full"


CASES = {
    "stage 4 x data 2": Case(dict(stage=4, data=2), remat="none"),
    "stage 2 x fsdp 2 x tensor 2": Case(dict(stage=2, fsdp=2, tensor=2), rounds=2),
    "stage 2 x context 2 x expert 2": Case(
        dict(stage=2, context=2, expert=2), rounds=2, remat="dots"
    ),
}
ONE = Case({})


def packed_batch(step: int) -> dict[str, np.ndarray]:
    """Rows of five documents, of which words can be learned, and padding."""
    rng = np.random.default_rng(step)
    names = ("tokens", "targets", "segments", "positions")
    batch = {name: np.zeros((ROWS, LENGTH), np.int32) for name in names}
    batch["targets"] -= 1
    for row in range(ROWS):
        cuts = np.sort(rng.choice(np.arange(2, LENGTH), 5, replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts], cuts, strict=False), 1):
            places, part = np.arange(stop - start), (row, slice(start, stop))
            words = (rng.integers(WORDS) + rng.integers(1, 4) * places) % WORDS
            batch["tokens"][part], batch["segments"][part] = words, number
            batch["positions"][part] = places
            batch["targets"][row, start : stop - 1] = words[1:]
    return batch


@dataclasses.dataclass(frozen=True)
class Course:
    """What 20 steps on a mesh gave."""

    setup: Setup
    step: jax.stages.Compiled
    initial: dict[str, np.ndarray]
    state: TrainState
    metrics: dict[str, np.ndarray]  # float64, by step


def setup_of(case: Case, model: str = "dense") -> Setup:
    config = override(CONFIG, MODELS[model])
    rounds = {
        "mesh.stage": case.sizes.get("stage", 1),
        "mesh.stage_rounds": case.rounds,
    }
    config = override(config, rounds | {"model.remat": case.remat})
    num_devices = int(np.prod(list(case.sizes.values()), dtype=np.int64))
    mesh = sharding.make_mesh(case.sizes, jax.devices()[:num_devices])
    return prepare(config, mesh)


@functools.cache
def train(name: str, model: str = "dense") -> Course:
    setup = setup_of(CASES.get(name, ONE), model)
    step, state, records = compile_step(setup), init_state(setup), []
    leaves = jax.device_get(jax.tree.leaves(state.params))
    initial = dict(zip(setup.leaf_paths, leaves, strict=True))
    place = setup.abstract_batch["tokens"].sharding
    for number in range(STEPS):
        state, metrics = step(state, jax.device_put(packed_batch(number), place))
        records.append(jax.device_get(metrics))
    metrics = {
        name: np.array([record[name] for record in records], np.float64)
        for name in records[0]
    }
    return Course(setup, step, initial, state, metrics)


@pytest.mark.parametrize("name", CASES)
def test_20_steps_are_those_of_one_device(name):
    model = "experts" if "expert" in name else "dense"
    one, many = train("one device", model), train(name, model)
    assert one.initial.keys() == many.initial.keys()
    assert all(np.array_equal(one.initial[p], many.initial[p]) for p in one.initial)
    assert np.ptp(one.metrics["loss"]) > 0.1  # it learns: they could differ
    apart = {
        metric: np.abs(many.metrics[metric] / one.metrics[metric] - 1).max()
        for metric in one.metrics
        if metric == "loss" or metric == "grad_norm" or metric.startswith("router")
    }
    print(f"\n{name:<28} " + ", ".join(f"{k} {v:.1e}" for k, v in apart.items()))
    assert apart.pop("grad_norm") < NORM_TOLERANCE
    assert max(apart.values()) < LOSS_TOLERANCE


def test_the_gradient_of_every_parameter_is_that_of_one_device():
    for model, name in (
        ("dense", "stage 2 x fsdp 2 x tensor 2"),
        ("experts", "stage 2 x context 2 x expert 2"),
    ):
        one, many = (
            train(n, model).metrics["leaf_norms"][0] for n in ("one device", name)
        )
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-7)


def test_an_evaluation_has_the_loss_of_the_step():
    course = train("stage 2 x fsdp 2 x tensor 2")
    places = course.setup.plan.shardings(course.state.params)
    tree = jax.tree.structure(course.state.params)
    params = jax.tree.unflatten(tree, course.initial.values())
    batch = packed_batch(0), course.setup.abstract_batch["tokens"].sharding
    evaluate = compile_eval(course.setup)
    nll, num_targets = evaluate(jax.device_put(params, places), jax.device_put(*batch))
    assert num_targets == course.metrics["num_targets"][0]
    assert nll / num_targets == pytest.approx(course.metrics["loss"][0], rel=1e-6)


def length_of_device(mesh: jax.sharding.Mesh) -> int:
    return LENGTH // mesh.shape["tensor"] // mesh.shape["context"]


def test_a_step_sends_what_its_schedule_says():
    course = train("stage 2 x fsdp 2 x tensor 2")
    schedule, mesh = course.setup.schedule, course.setup.mesh
    assert schedule is not None
    text = course.step.as_text()
    assert text is not None
    found = collections.Counter()
    for sent in sharding.read_collectives(text, mesh):
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


@pytest.mark.parametrize("name", CASES)
def test_no_tick_keeps_a_copy_of_layers(name):
    course = train(name, "experts" if "expert" in name else "dense")
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

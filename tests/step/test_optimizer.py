# SPDX-License-Identifier: Apache-2.0
"""Learning rates at exact steps; what each optimizer does, alone and on a mesh."""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding
from jaxllm.config import OptimizerConfig
from jaxllm.errors import InputError
from jaxllm.step.muon import is_matrix
from jaxllm.step.optimizer import make_optimizer, make_schedule, muon_parameters

NAMES = ("adamw", "muon", "adafactor", "lion", "sgd")
SIZES = dict(L=2, D=128, N=4, K=2, H=16, F=256, V=144)
AXES: dict[str, Any] = {
    "embedding": "VD",
    "blocks": {
        "0": {
            "query": "LDNH",
            "key": "LDKH",
            "out": "LNHD",
            "up": "LDF",
            "down": "LFD",
            "query_bias": "LNH",
            "norm": "LD",
            "query_norm": "LH",
        }
    },
    "final_norm": "D",
    "output": "DV",
}
MATRICES = ["blocks/0/down", "blocks/0/key", "blocks/0/out", "blocks/0/query"]
MATRICES += ["blocks/0/up"]


def config(**changes) -> OptimizerConfig:
    return replace(OptimizerConfig(lr=0.5), **changes)


def tree(seed: int, scale: float) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(letters):
        shape = tuple(SIZES[letter] for letter in letters)
        return np.float32(scale * rng.normal(size=shape))

    return jax.tree.map(draw, AXES)


def by_path(values) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): value
        for path, value in jax.tree.leaves_with_path(values)
    }


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def update(optimizer):
    return jax.numpy_dtype_promotion("standard")(optimizer.update)


def first_update(optimizer, grads, params):
    def start(grads, params):
        return update(optimizer)(grads, optimizer.init(params), params)

    return jax.jit(start)(grads, params)


# Schedules


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_the_learning_rate_at_start_after_warmup_and_at_the_end(name):
    lr = make_schedule(config(schedule=name, warmup_steps=4, final_lr_fraction=0.2), 24)
    assert [float(lr(step)) for step in range(5)] == [0.125, 0.25, 0.375, 0.5, 0.5]
    end = 0.5 if name == "constant" else 0.1
    assert float(lr(24)) == pytest.approx(end)
    assert float(lr(1000)) == pytest.approx(end)  # a run continued with more steps
    half = dict(cosine=0.3, linear=0.3, constant=0.5, wsd=0.5)
    assert float(lr(14)) == pytest.approx(half[name])


def test_wsd_stays_at_the_peak_until_its_last_part_then_falls_in_a_line():
    lr = make_schedule(config(schedule="wsd", decay_fraction=0.25, warmup_steps=2), 40)
    rates = [float(lr(step)) for step in range(41)]
    assert rates[1:31] == [0.5] * 30
    assert np.diff(rates[30:]) == pytest.approx([-0.045] * 10)
    assert rates[40] == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_a_schedule_never_falls_below_its_end_nor_rises_above_its_peak(name, warmup):
    changes = dict(schedule=name, warmup_steps=warmup, final_lr_fraction=0.0)
    lr = make_schedule(config(**changes), 10)
    rates = np.array([lr(step) for step in range(12)])
    assert np.all(np.isfinite(rates))
    assert 0 <= rates.min() <= rates.max() <= 0.5
    assert np.all(rates[:10] > 0)  # no update is for nothing
    assert np.all(np.diff(rates[warmup:]) <= 0)


def test_a_schedule_takes_a_traced_step_and_gives_float32():
    lr = make_schedule(config(warmup_steps=3), 10)
    traced = jax.jit(lr)(jnp.int32(5))
    assert traced.dtype == jnp.float32
    assert float(traced) == pytest.approx(float(lr(5)), rel=1e-6)


# Which parameters


def test_muon_takes_the_matrices_of_the_blocks_only():
    assert muon_parameters(AXES) == MATRICES
    assert muon_parameters({"embedding": "VD", "norm": "D", "bias": "LNH"}) == []


def test_muon_without_a_matrix_is_refused():
    with pytest.raises(InputError, match=r"config\.optimizer\.name=muon"):
        make_optimizer(config(name="muon"), 10, {"embedding": "VD", "norm": "D"})


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_shrinks_matrices_only_and_by_lr_times_decay(name):
    optimizer = make_optimizer(config(name=name, weight_decay=0.1), 10, AXES)
    params = tree(0, 1.0)
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = first_update(optimizer, zero, params)
    for path, value in by_path(updates).items():
        decayed = is_matrix(by_path(AXES)[path])
        expected = -0.5 * 0.1 * by_path(params)[path] * (1.0 if decayed else 0.0)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)


# Updates


@pytest.mark.parametrize("name", NAMES)
def test_the_first_update_has_the_same_size_for_every_optimizer_but_sgd(name):
    changes = dict(name=name, schedule="constant", clip_norm=None)
    optimizer = make_optimizer(config(**changes), 10, AXES)
    params, grads = tree(0, 1.0), tree(1, 1e-3)
    updates, state = first_update(optimizer, grads, params)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((updates, state))}
    assert dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    for path, value in by_path(updates).items():
        size = 0.2 if name == "muon" and path in MATRICES else 1.0
        size = rms(by_path(grads)[path]) if name == "sgd" else size
        # The Newton-Schulz iteration of Muon ends with singular values of 0.7 to 1.2.
        assert rms(value) == pytest.approx(0.5 * size, rel=0.3), path
        assert float(jnp.vdot(value, by_path(grads)[path])) < 0


def test_muon_makes_each_layers_matrix_orthogonal_from_its_inputs_to_its_outputs():
    changes = dict(name="muon", schedule="constant", lr=1.0)
    optimizer = make_optimizer(config(**changes), 10, AXES)
    params = tree(0, 1.0)
    updates, _ = jax.jit(update(optimizer))(
        tree(1, 1.0), optimizer.init(params), params
    )
    block = updates["blocks"]["0"]
    matrices = {
        "query": block["query"].reshape(2, 128, 64),
        "out": block["out"].reshape(2, 64, 128),
        "down": block["down"],
    }
    for name, matrix in matrices.items():
        values = np.linalg.svd(matrix, compute_uv=False)
        values = values / (0.2 * math.sqrt(max(matrix.shape[1:])))
        assert values.min() > 0.5, name
        assert values.max() < 1.3, name


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_moves_alone_as_it_does_in_a_stack(name):
    changes = dict(name=name, schedule="constant", clip_norm=None)
    spike = tree(1, 1e-3)
    for leaf in jax.tree.leaves(spike["blocks"]):
        leaf[1:] *= 1000

    def two_updates(axes, grads):
        optimizer = make_optimizer(config(**changes), 10, axes)
        params = jax.tree.map(jnp.zeros_like, grads)
        step = jax.jit(update(optimizer))
        _, state = step(grads, optimizer.init(params), params)
        return step(grads, state, params)[0]["blocks"]

    def layer(tree):
        return {**tree, "blocks": jax.tree.map(lambda x: x[0], tree["blocks"])}

    alone = {**AXES, "blocks": jax.tree.map(lambda x: x[1:], AXES["blocks"])}
    stacked = jax.tree.map(lambda x: x[0], two_updates(AXES, spike))
    for path, value in by_path(two_updates(alone, layer(spike))).items():
        got = by_path(stacked)[path]
        np.testing.assert_allclose(got, value, atol=1e-5 * rms(value), err_msg=path)


@pytest.mark.parametrize("shape", [(128, 256), (256, 128)])
def test_adafactor_is_optax_s_for_a_matrix_with_two_dims(shape):
    changes = dict(name="adafactor", lr=1.0, schedule="constant", clip_norm=None)
    ours = make_optimizer(config(**changes), 10, {"w": "DF"})
    theirs = optax.chain(
        optax.scale_by_factored_rms(epsilon=1e-16), optax.clip_by_block_rms(1.0)
    )
    params: Any = {"w": jnp.zeros(shape)}
    states: Any = [each.init(params) for each in (ours, theirs)]
    for seed in range(4):
        grads = {"w": 10.0**-seed * jax.random.normal(jax.random.key(seed), shape)}
        found, states[0] = update(ours)(grads, states[0], params)
        expected, states[1] = update(theirs)(grads, states[1], params)
        np.testing.assert_allclose(found["w"], -expected["w"], rtol=1e-5)


def test_adafactor_keeps_a_row_and_a_column_of_each_layers_matrix():
    sizes = dict(L=4, E=8, D=512, N=8, H=64, F=1024)
    axes = {"query": "LDNH", "out": "LNHD", "up": "LEDF", "scale": "LD"}
    params = {
        name: jax.ShapeDtypeStruct([sizes[x] for x in letters], jnp.float32)
        for name, letters in axes.items()
    }
    optimizer = make_optimizer(config(name="adafactor"), 10, axes)
    state = jax.eval_shape(optimizer.init, params)
    numbers = {name: 0 for name in axes}
    for path, leaf in by_path(state).items():
        name = path.rpartition("/")[2]
        if name in numbers:
            numbers[name] += leaf.size
    assert numbers == {
        "query": 4 * (512 + 8 * 64),
        "out": 4 * (8 * 64 + 512),
        "up": 4 * 8 * (512 + 1024),
        "scale": 4 * (512 + 1),
    }


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_clipping_bounds_the_global_norm_before_the_scaling(name):
    clipped = make_optimizer(config(name=name, clip_norm=1.0), 10, AXES)
    free = make_optimizer(config(name=name, clip_norm=None), 10, AXES)
    params, grads = tree(0, 1.0), tree(1, 1.0)
    norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))
    unit = jax.tree.map(lambda g: g / norm, grads)
    a, _ = first_update(clipped, grads, params)
    b, _ = first_update(free, unit, params)
    for path, value in by_path(a).items():
        np.testing.assert_allclose(value, by_path(b)[path], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_keeps_its_structure_when_lr_decay_or_clipping_change(name):
    def state(**changes):
        optimizer = make_optimizer(config(name=name, **changes), 10, AXES)
        return jax.eval_shape(optimizer.init, tree(0, 1.0))

    other = state(lr=1.0, weight_decay=0.1, clip_norm=None, schedule="wsd")
    assert jax.tree.structure(state()) == jax.tree.structure(other)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_a_linear_map(name):
    axes = {"w": "DF"}
    key_w, key_x = jax.random.split(jax.random.key(0))
    target_DF = jax.random.normal(key_w, (8, 16))
    x_BD = jax.random.normal(key_x, (64, 8))
    changes = dict(name=name, lr=0.2, schedule="linear", clip_norm=None)
    optimizer = make_optimizer(config(**changes), 200, axes)

    def loss(params):
        return jnp.mean((x_BD @ (params["w"] - target_DF)) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = update(optimizer)(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params: Any = {"w": jnp.zeros((8, 16))}
    start, state = loss(params), optimizer.init(params)
    for _ in range(200):
        params, state = step(params, state)
    assert loss(params) < 0.05 * start


# On a mesh


def after_two_updates(optimizer, params, grads, init, step):
    state = init(params)
    for grad in grads:
        params, state = step(grad, state, params)
    return params, state


@pytest.mark.parametrize("name", NAMES)
def test_sharded_updates_are_the_unsharded_ones_and_moments_stay_sharded(name):
    changes = dict(name=name, lr=0.01, weight_decay=0.1, warmup_steps=2)
    optimizer = make_optimizer(config(**changes), 10, AXES)
    params, grads = tree(0, 0.1), [tree(1, 0.01), tree(2, 0.01)]

    def step(do_update, grad, state, params):
        do_update = jax.numpy_dtype_promotion("standard")(do_update)
        updates, state = do_update(grad, state, params)
        return optax.apply_updates(params, updates), state

    alone, _ = after_two_updates(
        optimizer,
        params,
        grads,
        jax.jit(optimizer.init),
        jax.jit(functools.partial(step, optimizer.update)),
    )
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    plan = sharding.plan(jax.eval_shape(lambda: params), by_path(AXES), mesh)
    state_places = plan.shardings(jax.eval_shape(optimizer.init, params))
    places = plan.shardings(params)
    specs, state_specs = jax.tree.map(lambda place: place.spec, (places, state_places))
    init = jax.sharding.auto_axes(optimizer.init, out_sharding=state_specs)
    sharded = jax.sharding.auto_axes(
        optimizer.update, out_sharding=(specs, state_specs)
    )
    with jax.set_mesh(mesh):
        together, state = after_two_updates(
            optimizer,
            jax.device_put(params, places),
            [jax.device_put(grad, places) for grad in grads],
            jax.jit(init),
            jax.jit(functools.partial(step, sharded)),
        )
    for path, value in by_path(together).items():
        expected = by_path(alone)[path]
        # Of the change, which passed through sums in another order (in Muon through
        # five products of matrices), and two roundings of the parameter itself.
        atol = 1e-5 * rms(expected - by_path(params)[path])
        atol += 2 * np.finfo(np.float32).eps * float(jnp.abs(expected).max())
        np.testing.assert_allclose(value, expected, rtol=0, atol=atol)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for path, leaf in by_path(state).items():
        replicated = leaf.sharding.is_fully_replicated
        assert not replicated or leaf.nbytes < whole / 100, path


@pytest.mark.parametrize("name", NAMES)
def test_biases_of_routers_move_by_the_sign_of_their_error_beside_all_else(name):
    rng = np.random.default_rng(0)
    axes = {"router": "LDR", "up": "LEDF", "norm": "LD"}
    sizes = dict(L=2, D=8, R=4, E=4, F=16)
    params = {
        path: np.float32(rng.normal(size=[sizes[letter] for letter in letters]))
        for path, letters in axes.items()
    }
    error = np.array([[3, -1, 0, -2], [0, 0, 1, -1]], np.float32)
    settings = config(name=name, weight_decay=0.1, clip_norm=0.5)
    plain = make_optimizer(settings, 10, axes)
    expected, _ = first_update(plain, params, params)
    optimizer = make_optimizer(
        settings, 10, {**axes, "router_bias": "LR"}, balance_step=0.25
    )
    # An error of any size: it is no part of the global norm that is clipped.
    both = {**params, "router_bias": 1000 * error}
    updates, _ = first_update(optimizer, both, both)
    np.testing.assert_array_equal(updates["router_bias"], -0.25 * np.sign(error))
    for path in axes:
        np.testing.assert_array_equal(updates[path], expected[path])

# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer against a loop over tokens."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from jaxllm.inspect.collectives import read_collectives
from jaxllm.models.moe.dispatch import sort_rows
from jaxllm.models.moe.experts import BIASES, LETTERS, Experts, run_experts

B, T, D, F, E, A = 8, 6, 5, 6, 8, 3
NO_EXPERT = E
LIMIT = 0.5  # acts on about half of the values
MESHES = {
    "expert 8": dict(expert=8),
    "fsdp 2 x expert 4": dict(fsdp=2, expert=4),
    "data 2 x expert 2 x tensor 2": dict(data=2, expert=2, tensor=2),
}


def draw(width: int = D, biases: bool = False) -> dict[str, np.ndarray]:
    """Returns inputs in float64: tokens, their experts, shares and weights."""
    rng = np.random.default_rng(0)
    choice = np.stack([rng.permutation(E)[:A] for _ in range(B * T)])
    choice = choice.reshape(B, T, A).astype(np.int32)
    choice[0, -2:] = NO_EXPERT  # padding
    share = np.where(choice < E, rng.uniform(0.1, 1.0, choice.shape), 0.0)
    sizes = {"B": B, "T": T, "D": width, "E": E, "F": F}
    weights = {
        name: rng.normal(size=[sizes[letter] for letter in letters]) / width**0.5
        for name, letters in (LETTERS | (BIASES if biases else {})).items()
    }
    return dict(x=rng.normal(size=(B, T, width)), share=share, choice=choice, **weights)


def loop(x, share, weights, *, choice, activation="swiglu", capacity=None, of="output"):
    """One token and expert after another; the specification."""

    def run_row(row):
        def add_pair(taken, pair):
            token, share, expert = pair
            taken = taken.at[expert].add(1)
            fits = (expert < E) & (capacity is None or taken[expert] <= capacity)
            mine = {name: weights[name][expert % E] for name in weights}
            if of == "input":
                token, share = token * share, 1.0
            hidden = token @ mine["up"] + mine.get("up_bias", 0.0)
            if activation == "gelu":
                hidden = jax.nn.gelu(hidden)
            else:
                gate = token @ mine["gate"] + mine.get("gate_bias", 0.0)
                if activation == "swiglu_clamped":
                    gate = jnp.where(gate > LIMIT, LIMIT, gate)
                    hidden = jnp.clip(hidden, -LIMIT, LIMIT) + 1.0
                    hidden *= gate / (1.0 + jnp.exp(-1.702 * gate))
                else:
                    act = jax.nn.silu if activation == "swiglu" else jax.nn.gelu
                    hidden *= act(gate)
            out = hidden @ mine["down"] + mine.get("down_bias", 0.0)
            return taken, jnp.where(fits, share * out, 0.0)

        x, share, choice = row
        pairs = (jnp.repeat(x, A, 0), share.reshape(-1), choice.reshape(-1))
        out = jax.lax.scan(add_pair, jnp.zeros(E + 1, jnp.int32), pairs)[1]
        return out.reshape(T, A, -1).sum(1)

    return jax.lax.map(run_row, (x, share, jnp.asarray(choice)))


def run(x, share, weights, *, choice, activation="swiglu", capacity=None, of="output"):
    limit = LIMIT if activation == "swiglu_clamped" else None
    experts = Experts(E, activation, capacity, "xla", limit, of)
    return run_experts(experts, x, share, jnp.asarray(choice), weights)


@functools.cache
def compiled(function, activation, capacity, mesh=None):
    """Returns (x, share, weights, choice) -> output, and its gradients."""
    del mesh  # one program for each

    def total(x, share, weights, choice):
        options = dict(choice=choice, activation=activation, capacity=capacity)
        out = function(x, share, weights, **options)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))


def values_and_gradients(
    function, inputs, activation="swiglu", capacity=None, mesh=None
):
    weights = {name: inputs[name] for name in LETTERS | BIASES if name in inputs}
    if activation == "gelu":
        weights = {n: w for n, w in weights.items() if not n.startswith("gate")}
    run = compiled(function, activation, capacity, mesh)
    return jax.device_get(run(inputs["x"], inputs["share"], weights, inputs["choice"]))


def assert_equal_in_float64(got, expected):
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("activation", "capacity"),
    [("swiglu", None), ("swiglu", 2), ("geglu", None), ("gelu", 1)],
)
def test_experts_equal_a_loop_over_tokens(activation, capacity):
    with jax.enable_x64(True):
        got = values_and_gradients(run, draw(), activation, capacity)
        expected = values_and_gradients(loop, draw(), activation, capacity)
        assert_equal_in_float64(got, expected)


@pytest.mark.parametrize(
    ("activation", "capacity"), [("swiglu_clamped", None), ("gelu", 2)]
)
def test_experts_with_biases_equal_a_loop_over_tokens(activation, capacity):
    with jax.enable_x64(True):
        got = values_and_gradients(run, draw(biases=True), activation, capacity)
        expected = values_and_gradients(loop, draw(biases=True), activation, capacity)
        assert_equal_in_float64(got, expected)


@pytest.mark.parametrize("capacity", [None, 2])
def test_a_share_of_the_input_equals_the_loop(capacity):
    of_input = [functools.partial(function, of="input") for function in (run, loop)]
    with jax.enable_x64(True):
        got, expected = (
            values_and_gradients(function, draw(), capacity=capacity)
            for function in of_input
        )
        assert_equal_in_float64(got, expected)


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("kind", ["one expert", "half are empty", "padding alone"])
def test_any_distribution_over_experts_equals_the_loop(kind, capacity):
    inputs = draw()
    choice = inputs["choice"]
    inputs["choice"] = {
        "one expert": np.where(np.arange(A) == 0, 5, NO_EXPERT) + 0 * choice,
        "half are empty": np.where(choice < E, choice // 2 * 2, NO_EXPERT),
        "padding alone": np.full_like(choice, NO_EXPERT),
    }[kind].astype(np.int32)
    with jax.enable_x64(True):
        got = values_and_gradients(run, inputs, capacity=capacity)
        expected = values_and_gradients(loop, inputs, capacity=capacity)
        assert_equal_in_float64(got, expected)


@functools.cache
def on_mesh(name: str, capacity: int | None, biases: bool = False):
    inputs = draw(8, biases)
    mesh = sharding.make_mesh(MESHES[name])
    places = dict(x="BTD", share="BTA", choice="BTA")
    with jax.enable_x64(True), jax.set_mesh(mesh):
        for path, value in inputs.items():
            table = sharding.COMPUTE if path in places else sharding.STORAGE
            letters = places.get(path) or (LETTERS | BIASES)[path]
            place = sharding.named_sharding(letters, table, mesh)
            inputs[path] = jax.device_put(value, place)
        return values_and_gradients(run, inputs, capacity=capacity, mesh=name)


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("name", MESHES)
def test_experts_are_the_same_on_every_mesh(name, capacity):
    with jax.enable_x64(True):
        alone = values_and_gradients(run, draw(width=8), capacity=capacity)
    assert_equal_in_float64(on_mesh(name, capacity), alone)


@pytest.mark.parametrize("capacity", [None, 2])
def test_experts_with_biases_are_the_same_on_a_mesh(capacity):
    with jax.enable_x64(True):
        alone = values_and_gradients(run, draw(8, biases=True), capacity=capacity)
    found = on_mesh("data 2 x expert 2 x tensor 2", capacity, biases=True)
    assert_equal_in_float64(found, alone)


def test_without_a_capacity_every_pair_has_a_row():
    groups = jnp.asarray(draw()["choice"].reshape(-1, A))
    rows = sort_rows(groups, E, groups.size)
    has_row = np.asarray(rows.row_of_pair) < groups.size
    np.testing.assert_array_equal(has_row, groups < E)
    np.testing.assert_array_equal(rows.sizes, np.bincount(groups[groups < E], None, E))


def test_a_capacity_keeps_the_first_pairs_of_each_group():
    groups = jnp.array([[0, 1], [0, 2], [0, 3], [2, 0]], jnp.int32)
    rows = sort_rows(groups, 3, 6, capacity=2)
    np.testing.assert_array_equal(rows.row_of_pair, [[0, 2], [1, 4], [6, 6], [5, 6]])
    np.testing.assert_array_equal(rows.pair_of_row, [0, 2, 1, 8, 3, 6])


@pytest.mark.parametrize("capacity", [None, 2])
def test_tokens_move_as_many_bytes_as_the_formulas_say(capacity):
    mesh, width = sharding.make_mesh(MESHES["fsdp 2 x expert 4"]), 256
    values = {
        path: jax.ShapeDtypeStruct(
            (
                *dict(x=(B, T, width), share=(B, T, A), choice=(B, T, A)).get(path, ()),
                *(dict(E=E, D=width, F=F)[i] for i in LETTERS.get(path, "")),
            ),
            jnp.int32 if path == "choice" else jnp.float32,
            sharding=sharding.named_sharding(
                dict(x="BTD", share="BTA", choice="BTA").get(path) or LETTERS[path],
                sharding.STORAGE if path in LETTERS else sharding.COMPUTE,
                mesh,
            ),
        )
        for path in ("x", "share", "choice", *LETTERS)
    }
    weights = {name: values[name] for name in LETTERS}
    args = (values["x"], values["share"], weights, values["choice"])
    with jax.set_mesh(mesh):
        step = compiled(run, "swiglu", capacity, "bytes").lower(*args).compile()
    sent = collections.defaultdict(float)
    for one in read_collectives(step.as_text() or "", mesh):
        if one.axes == ("expert",):
            sent[one.kind] += one.wire_bytes * (one.count or 1)
    # Not in a loop over layers, the backward pass takes what the forward pass received.
    ways, rows, item = 4, B // 8, 4
    token, pair = width * item, A * item
    others = (ways - 1) * rows * T
    if capacity is None:
        assert sent == {
            # x, shares and choices; the gradient of the output.
            "all-gather": others * (token + 2 * pair + token),
            # The output; gradients of x and of the shares.
            "reduce-scatter": others * (2 * token + pair),
        }
    else:
        places = rows * E * capacity * (ways - 1) / ways
        assert sent == {
            # x and the output, their gradients; shares and their gradients.
            "all-to-all": places * (4 * token + 2 * item),
        }

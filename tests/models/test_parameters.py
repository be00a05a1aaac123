# SPDX-License-Identifier: Apache-2.0
"""How parameters start, and the operations that read them."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from jaxllm.config import presets
from jaxllm.models import Model, parameters
from jaxllm.models.parameters import (
    embed,
    matrix,
    project,
    project_all,
    project_gated,
)

MESH_SIZES = [{}, dict(data=2, fsdp=2, tensor=2), dict(fsdp=8)]


@pytest.fixture(scope="module")
def params():
    return Model(presets.tiny_1m()), jax.jit(Model(presets.tiny_1m()).init)(
        jax.random.key(0)
    )


def test_matrices_start_with_the_deviation_of_their_fan_in(params):
    model, values = params
    config, block = model.config, values["blocks"]["0"]
    depth = (2 * config.num_layers) ** -0.5
    expected = {
        "embedding": (values["embedding"], 0.02),
        "output": (values["output"], 0.02),
        "query": (block["attention"]["query"], config.d_model**-0.5),
        "out": (block["attention"]["out"], config.d_model**-0.5 * depth),
        "up": (block["mlp"]["up"], config.d_model**-0.5),
        "down": (block["mlp"]["down"], config.d_ff**-0.5 * depth),
    }
    for name, (leaf, std) in expected.items():
        # A sample of n has a relative error of 1 / sqrt(2 n); 5 of those never happen.
        assert leaf.std() == pytest.approx(std, rel=5 / (2 * leaf.size) ** 0.5), name
        assert abs(leaf.mean()) < 5 * std / leaf.size**0.5, name
        assert np.abs(leaf).max() < 4.9 * std, name


def test_norms_start_as_the_identity(params):
    _, values = params
    assert np.all(values["final_norm"]["scale"] == 1)
    assert np.all(values["blocks"]["0"]["mlp_norm"]["scale"] == 1)


def test_layers_and_matrices_start_differently(params):
    _, values = params
    block = values["blocks"]["0"]
    query = np.asarray(block["attention"]["query"])
    assert len({layer.tobytes() for layer in query}) == len(query)
    assert not np.array_equal(query, block["attention"]["key"])
    assert not np.array_equal(block["mlp"]["up"], block["mlp"]["gate"])


def test_a_matrix_looks_like_a_bell_curve():
    w = matrix(jax.random.key(0), (256, 256), "DF", 1.0)[...]
    z = np.sort(np.asarray(w).ravel())
    # Fourth moment of a sum of eight uniforms: 3 - 6 / 5 / 8.
    assert (z**4).mean() == pytest.approx(2.85, abs=0.1)
    assert np.mean(np.abs(z) < 1) == pytest.approx(0.6778, abs=0.01)


@pytest.mark.parametrize("counts", [2**32, 2**7, 2**4])
@pytest.mark.parametrize("sizes", MESH_SIZES)
def test_a_matrix_has_the_same_bits_however_it_is_cut(sizes, counts, monkeypatch):
    monkeypatch.setattr(parameters, "_COUNTS", counts)
    mesh = sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
    place = sharding.named_sharding("DNH", sharding.STORAGE, mesh)

    def draw(key):
        return matrix(key, (16, 4, 6), "DNH", 0.3)[...]

    plain = jax.jit(draw)(jax.random.key(7))
    with jax.set_mesh(mesh):
        cut = jax.jit(jax.sharding.auto_axes(draw, out_sharding=place.spec))
        got = cut(jax.random.key(7))
    assert got.sharding.is_equivalent_to(place, got.ndim)
    np.testing.assert_array_equal(got, plain)


def test_a_seed_means_the_same_parameters_as_ever():
    w = np.asarray(matrix(jax.random.key(7), (16, 4, 6), "DNH", 1.0)[...])
    assert zlib.crc32(w.tobytes()) == 2330383897


def test_no_element_returns_in_a_parameter_that_a_counter_cannot_number(monkeypatch):
    shape, letters = (8, 16, 32), "EDF"

    def draw(counts):
        monkeypatch.setattr(parameters, "_COUNTS", counts)
        return np.asarray(matrix(jax.random.key(0), shape, letters, 1.0)[...])

    # The counter wrapped: experts were the same, bit for bit.
    for counts in (2**11, 2**9, 2**8, 2**5, 2**3):
        w = draw(counts)
        assert w.std() == pytest.approx(1, rel=0.05)
        rows = w.reshape(-1, 8)
        assert len(np.unique(rows, axis=0)) == len(rows), counts
    np.testing.assert_array_equal(draw(2**12), draw(2**32))


def test_each_of_256_large_experts_has_a_key_of_its_own():
    def traced(shape):
        draw = jax.make_jaxpr(lambda key: matrix(key, shape, "EDF", 1.0)[...])
        return str(draw(jax.random.key(0)))

    assert "random_fold_in" not in traced((128, 4096, 8192))  # 2**32 elements
    assert "256] = random_fold_in" in traced((256, 4096, 8192))


def whole(shape, seed: int) -> np.ndarray:
    """Whole numbers, so that sums are exact in any order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


@pytest.mark.parametrize("sizes", MESH_SIZES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_project_has_the_value_and_gradients_of_a_plain_contraction(sizes, dtype):
    mesh = sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
    x, w, dy = whole((8, 4, 16), 0), whole((16, 4, 2), 1), whole((8, 4, 4, 2), 2)

    def pull(x, w, dy):
        y, back = jax.vjp(lambda x, w: project("BTD,DNH->BTNH", x, w), x, w)
        return y, *back(dy)

    with jax.set_mesh(mesh):
        y, dx, dw = jax.jit(pull)(
            put(x.astype(dtype), "BTD", sharding.COMPUTE, mesh),
            put(w, "DNH", sharding.STORAGE, mesh),
            put(dy.astype(dtype), "BTNH", sharding.COMPUTE, mesh),
        )
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
    assert dw.sharding.spec == sharding.spec("DNH", sharding.STORAGE, mesh)
    rounded = np.einsum("BTD,DNH->BTNH", x, w).astype(dtype)
    np.testing.assert_array_equal(y.astype(jnp.float32), rounded.astype(np.float32))
    rounded = np.einsum("BTNH,DNH->BTD", dy, w).astype(dtype)
    np.testing.assert_array_equal(dx.astype(jnp.float32), rounded.astype(np.float32))
    np.testing.assert_array_equal(dw, np.einsum("BTD,BTNH->DNH", x, dy))


@pytest.mark.parametrize(
    ("rematted", "table"),
    [(False, sharding.COMPUTE), (True, sharding.COMPUTE), (True, sharding.RESIDUAL)],
)
@pytest.mark.parametrize("sizes", MESH_SIZES)
def test_project_all_adds_up_the_gradients_of_x(sizes, rematted, table):
    mesh = sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
    x, weights = whole((8, 4, 16), 0), (whole((16, 4, 2), 1), whole((16, 2, 2), 2))
    dys = whole((8, 4, 4, 2), 3), whole((8, 4, 2, 2), 4)
    subscripts = "BTD,DNH,DKH->BTNH,BTKH"

    def pull(x, weights, dys):
        def run(x, weights):
            return project_all(subscripts, x, weights, rematted)

        ys, back = jax.vjp(run, x, weights)
        return ys, back(dys)

    letters, out_letters = ("DNH", "DKH"), ("BTNH", "BTKH")
    with jax.set_mesh(mesh):
        ys, (dx, dweights) = jax.jit(pull)(
            put(x, "BTD", table, mesh),
            tuple(
                put(w, axes, sharding.STORAGE, mesh)
                for w, axes in zip(weights, letters, strict=True)
            ),
            tuple(
                put(dy, axes, sharding.COMPUTE, mesh)
                for dy, axes in zip(dys, out_letters, strict=True)
            ),
        )
    parts = []
    for w, axes, dy, out, y, dw in zip(
        weights, letters, dys, out_letters, ys, dweights, strict=True
    ):
        np.testing.assert_array_equal(y, np.einsum(f"BTD,{axes}->{out}", x, w))
        np.testing.assert_array_equal(dw, np.einsum(f"BTD,{out}->{axes}", x, dy))
        assert dw.sharding.spec == sharding.spec(axes, sharding.STORAGE, mesh)
        parts.append(np.einsum(f"{out},{axes}->BTD", dy, w))
    np.testing.assert_array_equal(dx, sum(parts))
    assert dx.sharding.spec == sharding.spec("BTD", table, mesh)


@pytest.mark.parametrize("rematted", [False, True])
@pytest.mark.parametrize("sizes", MESH_SIZES)
def test_project_gated_puts_its_gradients_where_they_belong(sizes, rematted):
    mesh = sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
    up, gate, w = whole((8, 4, 16), 0), whole((8, 4, 16), 1), whole((16, 8), 2)
    dout = whole((8, 4, 8), 3)

    def hidden(up, gate):  # exact, as sums of whole numbers are
        return up * (gate * gate)

    def pull(up, gate, w, dout):
        def run(up, gate, w):
            return project_gated(hidden, up, gate, w, rematted)

        out, back = jax.vjp(run, up, gate, w)
        return out, *back(dout)

    with jax.set_mesh(mesh):
        out, dup, dgate, dw = jax.jit(pull)(
            put(up, "BTF", sharding.COMPUTE, mesh),
            put(gate, "BTF", sharding.COMPUTE, mesh),
            put(w, "FD", sharding.STORAGE, mesh),
            put(dout, "BTD", sharding.COMPUTE, mesh),
        )
    h, dh = up * gate**2, np.einsum("BTD,FD->BTF", dout, w)
    np.testing.assert_array_equal(out, np.einsum("BTF,FD->BTD", h, w))
    np.testing.assert_array_equal(dup, dh * gate**2)
    np.testing.assert_array_equal(dgate, dh * up * 2 * gate)
    np.testing.assert_array_equal(dw, np.einsum("BTF,BTD->FD", h, dout))
    for x in (dup, dgate):
        assert x.sharding.spec == sharding.spec("BTF", sharding.COMPUTE, mesh)
    assert dw.sharding.spec == sharding.spec("FD", sharding.STORAGE, mesh)


@pytest.mark.parametrize("sizes", MESH_SIZES)
def test_embed_looks_up_rows_and_adds_their_gradients_in_float32(sizes):
    mesh = sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
    table, dx = whole((32, 16), 0), whole((8, 4, 16), 1)
    tokens = np.random.default_rng(2).integers(0, 32, (8, 4)).astype(np.int32)
    tokens[:, 0] = 5  # many times the same word

    def pull(tokens, table, dx):
        dtype = jnp.dtype(jnp.bfloat16)
        x, back = jax.vjp(lambda table: embed(tokens, table, dtype), table)
        return x, *back(dx)

    with jax.set_mesh(mesh):
        x, dtable = jax.jit(pull)(
            put(tokens, "BT", sharding.COMPUTE, mesh),
            put(table, "VD", sharding.STORAGE, mesh),
            put(dx.astype(jnp.bfloat16), "BTD", sharding.COMPUTE, mesh),
        )
    assert (x.dtype, dtable.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(x.astype(jnp.float32), table[tokens])
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, dx)
    np.testing.assert_array_equal(dtable, expected)
    assert dtable.sharding.spec == sharding.spec("VD", sharding.STORAGE, mesh)


def put(x: np.ndarray, letters: str, table, mesh) -> jax.Array:
    return jax.device_put(x, sharding.named_sharding(letters, table, mesh))

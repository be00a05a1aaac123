# SPDX-License-Identifier: Apache-2.0
"""Muon's orthogonal matrices: alone, stacked, and exchanged between devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from jaxllm.step.muon import (
    COEFFICIENTS,
    NUM_ITERATIONS,
    has_muon,
    is_matrix,
    orthogonalize,
)

# An iteration multiplies a small singular value, and the rounding error beside it, by
# the polynomial's slope at 0. Both sides of a comparison round.
TOLERANCE = 2 * float(np.finfo(np.float32).eps) * COEFFICIENTS[0] ** NUM_ITERATIONS


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def test_matrices_are_told_from_biases_and_norms_by_their_letters():
    assert all(map(is_matrix, ["VD", "DV", "LDNH", "DKH", "LNHD", "DF", "FD", "LEDF"]))
    vectors = ["D", "LD", "H", "LH", "NH", "LNH", "KH", "F", "LF", "V", "ED"]
    assert not any(map(is_matrix, vectors))
    assert [has_muon(letters) for letters in ("LDNH", "FD", "VD", "D")] == [1, 1, 0, 0]


def test_muon_exchanges_layers_and_gathers_nothing():
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    place = sharding.named_sharding("LDF", sharding.STORAGE, mesh)
    x = jax.ShapeDtypeStruct((8, 16, 32), jnp.float32, sharding=place)
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x: orthogonalize(x, "LDF")).lower(x).compile()
    text = compiled.as_text() or ""
    found = re.findall(
        r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)\(", text
    )
    assert found == ["all-to-all"] * 4  # there and back, for fsdp and for tensor


def test_muon_is_the_same_for_a_stack_of_layers_and_for_each_layer():
    x = normal(3, 16, 4, 8)
    stacked = orthogonalize(x, "LDNH")
    for layer, value in zip(x, stacked, strict=True):
        alone = orthogonalize(layer, "DNH")
        np.testing.assert_allclose(alone, value, rtol=0, atol=TOLERANCE * rms(value))
        transposed = orthogonalize(layer.transpose(1, 2, 0), "NHD").transpose(2, 0, 1)
        np.testing.assert_allclose(
            transposed, value, rtol=0, atol=TOLERANCE * rms(value)
        )


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"stage": 2, "fsdp": 2, "tensor": 2}])
def test_muon_is_the_same_with_more_devices_than_layers(sizes):
    x = normal(2, 16, 4, 8)
    mesh = sharding.make_mesh(sizes)
    placed = jax.device_put(x, sharding.named_sharding("LDNH", sharding.STORAGE, mesh))
    with jax.set_mesh(mesh):
        spread = jax.jit(lambda x: orthogonalize(x, "LDNH"))(placed)
    assert spread.sharding == placed.sharding
    alone = orthogonalize(x, "LDNH")
    np.testing.assert_allclose(spread, alone, rtol=0, atol=TOLERANCE * rms(alone))


def test_a_zero_matrix_stays_zero():
    assert float(jnp.abs(orthogonalize(jnp.zeros((4, 8)), "DF")).max()) == 0

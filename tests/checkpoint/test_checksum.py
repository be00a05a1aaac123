# SPDX-License-Identifier: Apache-2.0
"""Checksums of arrays: the same on every mesh, another for every change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from jaxllm.checkpoint.checksum import checksums
from jaxllm.checkpoint.label import json_checksum

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_of_any_bit_of_any_element_changes_the_sum(dtype):
    x = np.asarray(jnp.arange(24).reshape(4, 6).astype(dtype))
    sums = {checksums({"x": jnp.asarray(x)})["x"]}
    raw = x.view(np.uint8).reshape(24, -1)
    for element in range(24):
        for bit in range(8 * raw.shape[1] if dtype != "bool" else 1):
            changed = raw.copy()
            changed[element, bit // 8] ^= 1 << bit % 8
            y = changed.reshape(-1).view(x.dtype).reshape(x.shape)
            sums.add(checksums({"x": jnp.asarray(y)})["x"])
    bits = 1 if dtype == "bool" else 8 * raw.shape[1]
    assert len(sums) == 1 + 24 * bits


def test_elements_that_change_places_change_the_sum():
    x = jnp.arange(12.0).reshape(3, 4)
    sums = {
        checksums({"x": y})["x"]
        for y in (x, x[::-1], x[:, ::-1], x.reshape(4, 3), x.T.reshape(3, 4))
    }
    assert len(sums) == 5


def test_the_sums_are_the_same_on_every_mesh():
    x = jax.random.normal(jax.random.key(0), (16, 32))
    tree = {"w": x, "step": jnp.int32(3)}
    one = checksums(tree)
    assert set(one) == {"w", "step"}
    for sizes in (dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)):
        mesh = sharding.make_mesh(sizes)
        place = sharding.named_sharding("DF", sharding.STORAGE, mesh)
        rest = jax.NamedSharding(mesh, jax.P())
        placed = {
            "w": jax.device_put(x, place),
            "step": jax.device_put(tree["step"], rest),
        }
        assert checksums(placed) == one


def test_json_has_a_sum_whatever_the_order_of_its_keys():
    assert json_checksum({"a": 1, "b": [2]}) == json_checksum({"b": [2], "a": 1})
    assert json_checksum({"a": 1}) != json_checksum({"a": 2})

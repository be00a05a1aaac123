# SPDX-License-Identifier: Apache-2.0
"""The model's loss: sums, its gradient by autodiff, and the same on every mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from jaxllm.config import LossConfig
from jaxllm.step.loss import Loss, next_token_loss

B, T, D, V = 8, 6, 16, 32
EPS = float(np.finfo(np.float32).eps)
# Sums over tokens, width and words, in another order on every mesh.
TOLERANCE = 4 * EPS * (B * T * D) ** 0.5
MESHES = [
    {},
    dict(data=8),
    dict(fsdp=8),
    dict(tensor=8),
    dict(data=2, fsdp=2, tensor=2),
]
CONFIG = LossConfig(z_loss=0.01, chunk_tokens=5)
SOFTCAP = 4.0


def draw(letters: str = "DV"):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    w = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    targets[rng.random((B, T)) < 0.3] = -1
    return x, (w if letters == "DV" else w.T.copy()), targets


def naive(x, w, targets, letters):
    """The same by all logits and JAX's own gradients."""

    def objective(x, w):
        logits_BTV = jnp.einsum(f"BTD,{letters}->BTV", x, w)
        logits_BTV = SOFTCAP * jnp.tanh(logits_BTV / SOFTCAP)
        lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        picked = jnp.take_along_axis(logits_BTV, targets.clip(0)[..., None], -1)[..., 0]
        nll = jnp.where(targets >= 0, lse_BT - picked, 0.0).sum()
        return nll + CONFIG.z_loss * jnp.where(targets >= 0, lse_BT**2, 0.0).sum(), nll

    run = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    return jax.jit(run)(x, w)


def run(x, w, targets, letters, config: LossConfig = CONFIG):
    def objective(x, w):
        return next_token_loss(x, w, targets, Loss(letters, SOFTCAP, config))

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(x, w)


def check(got: Any, expected: Any):
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        atol = TOLERANCE * float(np.abs(b).max())
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("letters", ["DV", "VD"])
def test_without_a_mesh_it_is_the_loss_of_all_logits(letters):
    x, w, targets = draw(letters)
    check(run(x, w, targets, letters), naive(x, w, targets, letters))


@pytest.mark.parametrize("letters", ["DV", "VD"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_on_a_mesh_it_is_the_loss_of_all_logits(letters, sizes):
    mesh = sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
    x, w, targets = draw(letters)
    expected = naive(x, w, targets, letters)
    with jax.set_mesh(mesh):
        placed = (
            put(x, "BTD", sharding.COMPUTE, mesh),
            put(w, letters, sharding.STORAGE, mesh),
            put(targets, "BT", sharding.COMPUTE, mesh),
        )
        got = run(*placed, letters)
    check(got, expected)
    dx, dw = got[1]
    assert dx.sharding.spec == sharding.spec("BTD", sharding.COMPUTE, mesh)
    assert dw.sharding.spec == sharding.spec(letters, sharding.STORAGE, mesh)


def put(x: np.ndarray, letters: str, table, mesh) -> jax.Array:
    return jax.device_put(x, sharding.named_sharding(letters, table, mesh))


@pytest.mark.parametrize("chunk_tokens", [1, 7, 48, 4096])
def test_chunks_change_nothing(chunk_tokens):
    x, w, targets = draw()
    other = LossConfig(z_loss=CONFIG.z_loss, chunk_tokens=chunk_tokens)
    check(run(x, w, targets, "DV", other), run(x, w, targets, "DV"))


def test_it_is_a_sum_so_that_parts_add_up():
    x, w, targets = draw()
    (objective, nll), _ = run(x, w, targets, "DV")
    parts = [run(x[s], w, targets[s], "DV")[0] for s in (slice(0, 3), slice(3, B))]
    assert float(objective) == pytest.approx(sum(float(p[0]) for p in parts), rel=1e-6)
    assert float(nll) == pytest.approx(sum(float(p[1]) for p in parts), rel=1e-6)


def test_the_gradient_scales_with_what_is_above_the_loss():
    x, w, targets = draw()

    def tripled(x, w):
        return 3 * next_token_loss(x, w, targets, Loss("DV", SOFTCAP, CONFIG))[0]

    got = jax.jit(jax.grad(tripled, argnums=(0, 1)))(x, w)
    _, (dx, dw) = run(x, w, targets, "DV")
    check(got, (3 * dx, 3 * dw))


def test_bfloat16_activations_have_a_float32_loss_and_weight_gradient():
    x, w, targets = draw()
    (objective, nll), (dx, dw) = run(x.astype(jnp.bfloat16), w, targets, "DV")
    assert objective.dtype == nll.dtype == dw.dtype == jnp.float32
    assert dx.dtype == jnp.bfloat16


def test_a_loss_without_gradients_is_the_same():
    x, w, targets = draw()
    loss = Loss("DV", SOFTCAP, CONFIG)
    got = jax.jit(next_token_loss, static_argnums=3)(x, w, targets, loss)
    check(got, run(x, w, targets, "DV")[0])

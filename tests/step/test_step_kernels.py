# SPDX-License-Identifier: Apache-2.0
"""A whole training step with every kernel, simulated, against plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from jaxllm.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    override,
)
from jaxllm.plan.cost import choices
from jaxllm.step import compile_step, init_state, prepare
from pallas_kernels import mosaic

T = 48
CONFIG = Config(
    steps=1,
    model=ModelConfig(
        vocab_size=1024,
        num_layers=1,
        d_model=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        d_ff=64,
        qk_norm=True,
        # What simulates a kernel has effects: neither remat nor a scan takes them.
        remat="none",
        scan_layers=False,
    ),
    data=DataConfig(paths=("none",), sequence_length=T, batch_size=2),
    loss=LossConfig(chunk_tokens=32, z_loss=1e-3),
    optimizer=OptimizerConfig(name="sgd", lr=1e-2),
)
EPS = float(jnp.finfo(jnp.bfloat16).eps)


def run_step(implementation: str, deterministic: bool) -> dict[str, Any]:
    """Returns the metrics of one step on packed rows, one with padding at its end."""
    names = ("attention", "norm", "cross_entropy")
    changes = {f"kernels.{name}": implementation for name in names}
    config = override(CONFIG, {**changes, "kernels.deterministic": deterministic})
    setup = prepare(config, sharding.make_mesh({}, jax.devices()[:1]))
    lines = choices(setup).splitlines()
    assert all(f": {implementation} (" in line for line in lines)
    tokens_BT = np.random.default_rng(0).integers(0, 1024, (2, T))
    segments_BT = np.array([[1] * 20 + [2] * 20 + [0] * (T - 40), [1] * T])
    batch = {
        "tokens": tokens_BT,
        "targets": np.where(segments_BT > 0, np.roll(tokens_BT, -1, 1), -1),
        "segments": segments_BT,
        "positions": np.stack([np.arange(T) % 20, np.arange(T)]),
    }
    place = setup.abstract_batch["tokens"].sharding
    placed = {n: jax.device_put(x.astype(np.int32), place) for n, x in batch.items()}
    _, metrics = compile_step(setup)(init_state(setup), placed)
    return jax.device_get(metrics)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_step_with_every_kernel_is_that_of_plain_jax(deterministic):
    plain = run_step("xla", True)
    with mosaic.interpret():
        kernels = run_step("mosaic", deterministic)
    # The loss is a mean over tokens of errors of both signs, a gradient's norm is not.
    assert kernels["loss"] == pytest.approx(plain["loss"], rel=EPS / 32)
    np.testing.assert_allclose(kernels["leaf_norms"], plain["leaf_norms"], rtol=2 * EPS)

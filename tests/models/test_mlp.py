# SPDX-License-Identifier: Apache-2.0
"""The gated MLP against plain code, what it keeps, and how XLA reads that.

What XLA makes of it on an H200 is compiled in a process of its own: this file, run as a
program.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sharding
from jaxllm.config import ModelConfig
from jaxllm.models.mlp import MLP
from jaxllm.models.transformer import _with_remat
from pallas_kernels import offline

B, T, D, F = 2, 8, 16, 24
BASE = ModelConfig(
    vocab_size=8,
    num_layers=1,
    d_model=D,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    d_ff=F,
    bias="all",
    dtype="float32",
)
EPS = float(np.finfo(np.float32).eps)
REMATS = ("none", "full", "save_attention", "dots")


def make(**changes) -> tuple[MLP, dict[str, jax.Array]]:
    """Returns an MLP and its parameters, biases among them."""
    config = dataclasses.replace(BASE, **changes)
    mlp = nnx.eval_shape(lambda: MLP(config, jax.random.key(0)))
    shapes = nnx.to_pure_dict(nnx.split(mlp)[1])
    rng = np.random.default_rng(0)
    values = {n: rng.normal(0, 0.3, s.shape) for n, s in sorted(shapes.items())}
    return mlp, {n: jnp.asarray(x, jnp.float32) for n, x in values.items()}


def run(mlp: MLP, x_BTD: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    graphdef, state = nnx.split(mlp)
    nnx.replace_by_pure_dict(state, params)

    def call(x_BTD, state):
        return nnx.merge(graphdef, state)(x_BTD)

    return _with_remat(call, mlp.config, scanned=mlp.config.scan_layers)(x_BTD, state)


def plain(mlp: MLP, x_BTD: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    """Returns what an MLP is, without a word about its backward pass."""
    biases = {n: b[None, None] for n, b in params.items() if "bias" in n}
    up_BTF = x_BTD @ params["up"] + biases["up_bias"]
    gate_BTF = x_BTD @ params["gate"] + biases["gate_bias"]
    act = jax.nn.silu if mlp.config.mlp == "swiglu" else jax.nn.gelu
    return (up_BTF * act(gate_BTF)) @ params["down"] + biases["down_bias"]


def draw(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, D)), jnp.float32)


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
def test_a_gated_mlp_has_the_value_and_gradients_of_plain_code(kind, remat):
    mlp, params = make(mlp=kind, remat=remat)

    def with_gradients(function):
        def pull(x_BTD, params, dout_BTD):
            out_BTD, back = jax.vjp(lambda *a: function(mlp, *a), x_BTD, params)
            return out_BTD, back(dout_BTD)

        return jax.jit(pull)(draw(1), params, draw(2))

    got, expected = with_gradients(run), with_gradients(plain)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        # Sums of up to F products a matmul, three matmuls in a row.
        atol = 3 * EPS * F**0.5 * float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
def test_a_gated_mlp_keeps_two_arrays_of_its_width(kind):
    mlp, params = make(mlp=kind)

    def kept(x_BTD, params):
        return jax.vjp(lambda *a: run(mlp, *a), x_BTD, params)[1]

    saved = jax.tree.leaves(jax.eval_shape(kept, draw(1), params))
    assert [leaf.shape for leaf in saved].count((B, T, F)) == 2


@pytest.mark.skipif(offline.toolchain() is None, reason="needs `make .venv/cuda`")
def test_xla_reads_what_was_kept_once_for_the_product_and_both_gradients():
    ended = offline.run_python([__file__])
    assert ended.returncode == 0, ended.stderr[-2000:]
    for remat in ("none", "full"):
        (line,) = re.findall(rf"^{remat}: (.*)$", ended.stdout, re.MULTILINE)
        assert sorted(line.split()) == ["1", "3"], ended.stdout  # forward, backward


def main() -> None:
    """Prints how many wide arrays each fusion of two layers on an H200 returns."""
    mesh = sharding.make_mesh({}, offline.described_devices(1))
    place = jax.NamedSharding(mesh, jax.P())
    # XLA makes one matmul of two below 32 MiB, and then others of what is behind.
    shape = 16, 1024, 256
    x_BTD = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    for remat in ("none", "full"):
        mlp, params = make(
            remat=remat, d_model=256, d_ff=2048, bias="none", dtype="bfloat16"
        )
        layers = {
            n: jax.ShapeDtypeStruct((2, *w.shape), w.dtype, sharding=place)
            for n, w in params.items()
        }
        pull = jax.jit(functools.partial(pull_layers, mlp))
        with jax.set_mesh(mesh):
            text = pull.lower(x_BTD, layers).compile().as_text()
        fusions = re.findall(r" = (\S.*?) fusion\(.*kind=kLoop", text or "")
        counts = [fusion.count("bf16[16,1024,2048]") for fusion in fusions]
        print(f"{remat}:", *(number for number in counts if number))


def pull_layers(mlp: MLP, x_BTD: jax.Array, layers: dict[str, jax.Array]):
    def total(x_BTD, layers):
        def step(x_BTD, params):
            return run(mlp, x_BTD, params), None

        return jax.lax.scan(step, x_BTD, layers)[0].astype(jnp.float32).sum()

    return jax.grad(total, argnums=(0, 1))(x_BTD, layers)


if __name__ == "__main__":
    main()

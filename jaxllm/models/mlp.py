# SPDX-License-Identifier: Apache-2.0
"""The feed-forward sublayer."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import sharding
from jaxllm.config import ModelConfig
from jaxllm.config.model import PLAIN_MLPS
from jaxllm.models.parameters import (
    add_bias,
    matrix,
    project,
    project_all,
    project_gated,
    vector,
)

# By `config.mlp`: of the gate, or of a layer without one.
ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "swiglu_clamped": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def gated(
    activation: str, limit: float | None, up: jax.Array, gate: jax.Array
) -> jax.Array:
    """Returns the hidden values of a gated layer, element by element.

    Args:
      activation: of `config.mlp`.
      limit: None, or what is clamped: the gate from above, up from both sides, and then
        up counts from -1. Source: OpenAI, gpt-oss, its reference code.
      up: of any shape, as gate.
    """
    if limit is not None:
        gate = jnp.minimum(gate, limit)
        up = jnp.clip(up, -limit, limit) + 1
    return up * ACTIVATIONS[activation](gate)


class MLP(nnx.Module):
    """A gated layer (Shazeer, arXiv:2002.05202) or a plain one, by `config.mlp`."""

    def __init__(self, config: ModelConfig, key: jax.Array, width: int | None = None):
        self.config = config
        d, f = config.d_model, width or config.d_ff
        keys = jax.random.split(key, 3)
        self.up = matrix(keys[0], (d, f), "DF", d**-0.5)
        if config.mlp not in PLAIN_MLPS:
            self.gate = matrix(keys[1], (d, f), "DF", d**-0.5)
        std = f**-0.5 * (2 * config.num_layers) ** -0.5
        self.down = matrix(keys[2], (f, d), "FD", std)
        if config.bias == "all":
            self.up_bias = vector(0.0, (f,), "F")
            self.down_bias = vector(0.0, (d,), "D")
            if config.mlp not in PLAIN_MLPS:
                self.gate_bias = vector(0.0, (f,), "F")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        run = self._plain if self.config.mlp in PLAIN_MLPS else self._gated
        out_BTD = sharding.place_like(run(x_BTD), x_BTD)
        if self.config.bias == "all":
            out_BTD = add_bias(out_BTD, self.down_bias[...], "D")
        return checkpoint_name(out_BTD, "mlp_out")

    def _plain(self, x_BTD):
        rematted = self.config.remat != "none"
        up_BTF = project("BTD,DF->BTF", x_BTD, self.up[...], rematted)
        if self.config.bias == "all":
            up_BTF = add_bias(up_BTF, self.up_bias[...], "F")
        h_BTF = ACTIVATIONS[self.config.mlp](checkpoint_name(up_BTF, "up"))
        return project("BTF,FD->BTD", h_BTF, self.down[...], rematted)

    def _gated(self, x_BTD):
        rematted = self.config.remat != "none"
        weights = self.up[...], self.gate[...]
        subscripts = "BTD,DF,DF->BTF,BTF"
        up_BTF, gate_BTF = project_all(subscripts, x_BTD, weights, rematted)
        if self.config.bias == "all":
            up_BTF = add_bias(up_BTF, self.up_bias[...], "F")
            gate_BTF = add_bias(gate_BTF, self.gate_bias[...], "F")
        # Behind it XLA makes all that the backward pass has of both in one fusion, of
        # 6 reads and writes; directly behind the matmuls it makes three, of 10.
        up_BTF, gate_BTF = jax.lax.optimization_barrier((up_BTF, gate_BTF))
        up_BTF = checkpoint_name(up_BTF, "up")
        gate_BTF = checkpoint_name(gate_BTF, "gate")
        limit = self.config.variant.mlp_limit
        hidden = functools.partial(gated, self.config.mlp, limit)
        return project_gated(hidden, up_BTF, gate_BTF, self.down[...], rematted)

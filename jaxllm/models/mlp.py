# SPDX-License-Identifier: Apache-2.0
"""The feed-forward sublayer."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import sharding
from jaxllm.config import ModelConfig
from jaxllm.models.parameters import (
    add_bias,
    matrix,
    project,
    project_all,
    project_gated,
    vector,
)


class MLP(nnx.Module):
    """SwiGLU, GeGLU (Shazeer, arXiv:2002.05202) or a plain GELU layer."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        d, f = config.d_model, config.d_ff
        keys = jax.random.split(key, 3)
        self.up = matrix(keys[0], (d, f), "DF", d**-0.5)
        if config.mlp != "gelu":
            self.gate = matrix(keys[1], (d, f), "DF", d**-0.5)
        std = f**-0.5 * (2 * config.num_layers) ** -0.5
        self.down = matrix(keys[2], (f, d), "FD", std)
        if config.bias == "all":
            self.up_bias = vector(0.0, (f,), "F")
            self.down_bias = vector(0.0, (d,), "D")
            if config.mlp != "gelu":
                self.gate_bias = vector(0.0, (f,), "F")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        run = self._plain if self.config.mlp == "gelu" else self._gated
        out_BTD = sharding.place_like(run(x_BTD), x_BTD)
        if self.config.bias == "all":
            out_BTD = add_bias(out_BTD, self.down_bias[...], "D")
        return checkpoint_name(out_BTD, "mlp_out")

    def _plain(self, x_BTD):
        rematted = self.config.remat != "none"
        up_BTF = project("BTD,DF->BTF", x_BTD, self.up[...], rematted)
        if self.config.bias == "all":
            up_BTF = add_bias(up_BTF, self.up_bias[...], "F")
        h_BTF = jax.nn.gelu(checkpoint_name(up_BTF, "up"))
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
        activation = jax.nn.silu if self.config.mlp == "swiglu" else jax.nn.gelu
        return project_gated(activation, up_BTF, gate_BTF, self.down[...], rematted)

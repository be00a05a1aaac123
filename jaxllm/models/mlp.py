# SPDX-License-Identifier: Apache-2.0
"""The feed-forward sublayer."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import sharding
from jaxllm.config import ModelConfig
from jaxllm.models.parameters import add_bias, matrix, project, project_all, vector


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
        biased, rematted = self.config.bias == "all", self.config.remat != "none"
        gate_BTF = None
        if self.config.mlp == "gelu":
            h_BTF = project("BTD,DF->BTF", x_BTD, self.up[...], rematted)
        else:
            weights = self.up[...], self.gate[...]
            subscripts = "BTD,DF,DF->BTF,BTF"
            h_BTF, gate_BTF = project_all(subscripts, x_BTD, weights, rematted)
        if biased:
            h_BTF = add_bias(h_BTF, self.up_bias[...], "F")
        h_BTF = checkpoint_name(h_BTF, "up")
        if gate_BTF is None:
            h_BTF = jax.nn.gelu(h_BTF)
        else:
            if biased:
                gate_BTF = add_bias(gate_BTF, self.gate_bias[...], "F")
            gate_BTF = checkpoint_name(gate_BTF, "gate")
            swiglu = self.config.mlp == "swiglu"
            h_BTF = h_BTF * (jax.nn.silu if swiglu else jax.nn.gelu)(gate_BTF)
        out_BTD = project("BTF,FD->BTD", h_BTF, self.down[...], rematted)
        out_BTD = sharding.place_like(out_BTD, x_BTD)
        if biased:
            out_BTD = add_bias(out_BTD, self.down_bias[...], "D")
        return checkpoint_name(out_BTD, "mlp_out")

# SPDX-License-Identifier: Apache-2.0
"""The one place where the model calls a norm."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels
import sharding
from jaxllm.config import KernelsConfig, ModelConfig
from jaxllm.models.parameters import vector


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the model's width, as the config says."""

    def __init__(self, config: ModelConfig, kernels: KernelsConfig):
        self.config, self.kernels = config, kernels
        self.scale = vector(1.0, (config.d_model,), "D")
        if config.norm == "layernorm":
            self.bias = vector(0.0, (config.d_model,), "D")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self._norm_locally(sharding.spec_of(x_BTD), x_BTD)

    def add(self, x_BTD: jax.Array, y_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the norm of x + y, and x + y: one pass of a kernel over both."""
        place = sharding.spec_of(x_BTD)
        return self._norm_locally((place, place), x_BTD, residual=y_BTD)

    def _norm_locally(self, outs: Any, x_BTD: jax.Array, **added_BTD: jax.Array) -> Any:
        layer = self.config.norm == "layernorm"
        norm = pallas_kernels.layer_norm if layer else pallas_kernels.rms_norm
        parameters = {"scale": self.scale} | ({"bias": self.bias} if layer else {})
        names = (*parameters, *added_BTD)

        def local_norm(x_BTD, *arrays):
            return norm(
                x_BTD,
                **dict(zip(names, arrays, strict=True)),
                eps=self.config.norm_eps,
                implementation=self.kernels.norm,
            )

        vectors = [
            sharding.gather(vector[...], "D", jnp.float32)
            for vector in parameters.values()
        ]
        place = sharding.spec_of(x_BTD)
        ins = (place, *("D" for _ in vectors), *(place for _ in added_BTD))
        return sharding.local(local_norm, ins, outs)(
            x_BTD, *vectors, *added_BTD.values()
        )


class HeadNorm(nnx.Module):
    """RMSNorm of each query or key head."""

    def __init__(self, config: ModelConfig, kernels: KernelsConfig):
        self.eps, self.kernels = config.norm_eps, kernels
        self.scale = vector(1.0, (config.head_dim,), "H")

    def __call__(self, x_BTNH: jax.Array) -> jax.Array:
        norm = functools.partial(
            pallas_kernels.rms_norm, eps=self.eps, implementation=self.kernels.norm
        )
        run = sharding.local(norm, ("BTNH", "H"), "BTNH")
        return run(x_BTNH, self.scale[...])

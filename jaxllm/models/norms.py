# SPDX-License-Identifier: Apache-2.0
"""The one place where the model calls a norm."""

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
        if config.variant.norm_scale:
            first = 0.0 if config.variant.norm_offset else 1.0
            self.scale = vector(first, (config.d_model,), "D")
        if config.norm == "layernorm" and config.variant.norm_bias:
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
        parameters = self._parameters(layer)
        names = (*parameters, *added_BTD)

        def local_norm(x_BTD, *arrays):
            return norm(
                x_BTD,
                **dict(zip(names, arrays, strict=True)),
                eps=self.config.norm_eps,
                implementation=self.kernels.norm,
            )

        place = sharding.spec_of(x_BTD)
        ins = (place, *("D" for _ in parameters), *(place for _ in added_BTD))
        return sharding.local(local_norm, ins, outs)(
            x_BTD, *parameters.values(), *added_BTD.values()
        )

    def _parameters(self, layer: bool) -> dict[str, jax.Array]:
        """Returns the vectors that the operation takes, float32, whole."""
        variant, d = self.config.variant, self.config.d_model
        scale_D = jnp.ones(d, jnp.float32)
        if variant.norm_scale:
            scale_D = sharding.gather(self.scale[...], "D", jnp.float32)
            scale_D = scale_D + 1 if variant.norm_offset else scale_D
        if not layer:
            return {"scale": scale_D}
        if variant.norm_bias:
            bias_D = sharding.gather(self.bias[...], "D", jnp.float32)
        else:
            bias_D = jnp.zeros(d, jnp.float32)
        return {"scale": scale_D, "bias": bias_D}


class HeadNorm(nnx.Module):
    """RMSNorm of each query or key head."""

    def __init__(self, config: ModelConfig, kernels: KernelsConfig):
        self.config, self.kernels = config, kernels
        if config.variant.qk_norm == "heads":
            first = 0.0 if config.variant.norm_offset else 1.0
            self.scale = vector(first, (config.head_dim,), "H")

    def __call__(self, x_BTNH: jax.Array) -> jax.Array:
        run = sharding.local(self._norm, ("BTNH", "H"), "BTNH")
        if self.config.variant.qk_norm != "heads":
            return run(x_BTNH, jnp.ones(self.config.head_dim, jnp.float32))
        if self.config.variant.norm_offset:
            return run(x_BTNH, self.scale[...] + 1)
        return run(x_BTNH, self.scale[...])

    def _norm(self, x_BTNH: jax.Array, scale_H: jax.Array) -> jax.Array:
        return pallas_kernels.rms_norm(
            x_BTNH,
            scale_H,
            eps=self.config.norm_eps,
            implementation=self.kernels.norm,
        )


class AllHeadsNorm(nnx.Module):
    """A norm with a scale for each head: RMSNorm over all of them, or LayerNorm."""

    def __init__(self, config: ModelConfig, letter: str):
        self.config, self.letters = config, f"{letter}H"
        num_heads = config.num_heads if letter == "N" else config.num_kv_heads
        self.scale = vector(1.0, (num_heads, config.head_dim), self.letters)

    def __call__(self, x_BTNH: jax.Array) -> jax.Array:
        flat = self.config.variant.qk_norm == "flat"
        x32_BTNH = x_BTNH.astype(jnp.float32)
        if not flat:
            x32_BTNH = x32_BTNH - x32_BTNH.mean(-1, keepdims=True)
        dims = (-2, -1) if flat else (-1,)
        variance = jnp.square(x32_BTNH).mean(dims, keepdims=True)
        normed_BTNH = x32_BTNH * jax.lax.rsqrt(variance + self.config.norm_eps)
        scale = sharding.gather(self.scale[...], self.letters, jnp.float32)
        return (normed_BTNH * scale[None, None]).astype(x_BTNH.dtype)

# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention with rotary positions and an optional KV cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import pallas_kernels
import sharding
from jaxllm.config import KernelsConfig, ModelConfig
from jaxllm.models.context_attention import ContextAttention
from jaxllm.models.norms import HeadNorm
from jaxllm.models.parameters import add_bias, matrix, project, project_all, vector
from pallas_kernels.attention import RangedAttention

Cache = dict[str, jax.Array]  # of one layer: "key" and "value", BSKH


class Attention(nnx.Module):
    """Projections, RoPE and the attention operation of one layer."""

    def __init__(
        self, config: ModelConfig, kernels: KernelsConfig, window: int, key: jax.Array
    ):
        self.config, self.kernels, self.window = config, kernels, window
        self.rematted = config.remat != "none"
        d, n, k, h = (
            config.d_model,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        keys = jax.random.split(key, 4)
        self.query = matrix(keys[0], (d, n, h), "DNH", d**-0.5)
        self.key = matrix(keys[1], (d, k, h), "DKH", d**-0.5)
        self.value = matrix(keys[2], (d, k, h), "DKH", d**-0.5)
        # 1 / sqrt(2 L) keeps the residual stream's variance from growing with depth:
        # Radford et al., "Language Models are Unsupervised Multitask Learners".
        std = (n * h) ** -0.5 * (2 * config.num_layers) ** -0.5
        self.out = matrix(keys[3], (n, h, d), "NHD", std)
        if config.bias != "none":
            self.query_bias = vector(0.0, (n, h), "NH")
            self.key_bias = vector(0.0, (k, h), "KH")
            self.value_bias = vector(0.0, (k, h), "KH")
        if config.bias == "all":
            self.out_bias = vector(0.0, (d,), "D")
        if config.qk_norm:
            self.query_norm = HeadNorm(config, kernels)
            self.key_norm = HeadNorm(config, kernels)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the layer's output and the cache with this call's keys and values."""
        q_BTNH, k_BTKH, v_BTKH = self._heads(x_BTD, positions_BT)
        if cache is None:
            out_BTNH = self._attend_rows(q_BTNH, k_BTKH, v_BTKH, segments_BT)
        else:
            cache = {
                "key": _write(cache["key"], k_BTKH, positions_BT),
                "value": _write(cache["value"], v_BTKH, positions_BT),
            }
            out_BTNH = self._attend_cached(q_BTNH, cache, positions_BT)
        out_BTD = project("BTNH,NHD->BTD", out_BTNH, self.out[...], self.rematted)
        out_BTD = sharding.place_like(out_BTD, x_BTD)
        if self.config.bias == "all":
            out_BTD = add_bias(out_BTD, self.out_bias[...], "D")
        return checkpoint_name(out_BTD, "attention_out"), cache

    def _heads(self, x_BTD, positions_BT):
        q_BTNH, k_BTKH, v_BTKH = project_all(
            "BTD,DNH,DKH,DKH->BTNH,BTKH,BTKH",
            x_BTD,
            (self.query[...], self.key[...], self.value[...]),
            self.rematted,
        )
        if self.config.bias != "none":
            q_BTNH = add_bias(q_BTNH, self.query_bias[...], "NH")
            k_BTKH = add_bias(k_BTKH, self.key_bias[...], "KH")
            v_BTKH = add_bias(v_BTKH, self.value_bias[...], "KH")
        if self.config.qk_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        q_BTNH = rotate(q_BTNH, positions_BT, self.config.rope_theta)
        k_BTKH = rotate(k_BTKH, positions_BT, self.config.rope_theta)
        return (
            checkpoint_name(q_BTNH, "query"),
            checkpoint_name(k_BTKH, "key"),
            checkpoint_name(v_BTKH, "value"),
        )

    def _attend_rows(self, q_BTNH, k_BSKH, v_BSKH, segments_BT):
        if sharding.axes_of("T"):
            return self._attend_shards(q_BTNH, k_BSKH, v_BSKH, segments_BT)
        masks = {} if segments_BT is None else {"segments_BT": segments_BT}
        return self._attend_locally(
            self.kernels.attention, q_BTNH, k_BSKH, v_BSKH, **masks
        )

    def _attend_shards(self, q_BTNH, k_BTKH, v_BTKH, segments_BT):
        attention = ContextAttention(
            RangedAttention(
                softcap=self.config.attention_softcap,
                deterministic=self.kernels.deterministic,
                implementation=self.kernels.attention,
            ),
            window=self.window,
            exchange=self.kernels.context,
        )
        segments = () if segments_BT is None else (segments_BT,)
        ins = ("BTNH", "BTKH", "BTKH", *("BT" for _ in segments))
        attention = sharding.local(attention, ins, "BTNH")
        return attention(q_BTNH, k_BTKH, v_BTKH, *segments)

    def _attend_cached(self, q_BTNH, cache, positions_BT):
        # cuDNN takes no query positions, whatever it does in training.
        named = self.kernels.attention
        implementation = "xla" if named == "cudnn" else named
        return self._attend_locally(
            implementation,
            q_BTNH,
            cache["key"],
            cache["value"],
            positions_BT=positions_BT,
        )

    def _attend_locally(self, implementation, q_BTNH, k_BSKH, v_BSKH, **masks_BT):
        def attention(q_BTNH, k_BSKH, v_BSKH, *masks):
            return pallas_kernels.attention(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                **dict(zip(masks_BT, masks, strict=True)),
                window=self.window,
                softcap=self.config.attention_softcap,
                deterministic=self.kernels.deterministic,
                implementation=implementation,
            )

        ins = ("BTNH", "BSKH", "BSKH", *("BT" for _ in masks_BT))
        attention = sharding.local(attention, ins, "BTNH")
        return attention(q_BTNH, k_BSKH, v_BSKH, *masks_BT.values())


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Returns heads turned by their position: RoPE, on the two halves of a head.

    Source: Su et al., "RoFormer" (arXiv:2104.09864), with the halves paired as in
    Llama's published weights for transformers.
    """
    half = x_BTNH.shape[-1] // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / half
    speeds = jnp.power(jnp.float32(theta), -exponents)
    angles = positions_BT[:, :, None].astype(jnp.float32) * speeds[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


def _write(cache_BSKH, new_BTKH, positions_BT):
    def write(cache_BSKH, new_BTKH, positions_BT):
        rows_B1 = jnp.arange(cache_BSKH.shape[0])[:, None]
        return cache_BSKH.at[rows_B1, positions_BT].set(new_BTKH)

    ins = ("BSKH", "BTKH", "BT")
    return sharding.local(write, ins, "BSKH")(cache_BSKH, new_BTKH, positions_BT)

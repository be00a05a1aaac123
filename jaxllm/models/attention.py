# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention with rotary positions and an optional KV cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import pallas_kernels
import sharding
from jaxllm.config import KernelsConfig, ModelConfig
from jaxllm.config.model import Layer
from jaxllm.models.context_attention import ContextAttention
from jaxllm.models.norms import AllHeadsNorm, HeadNorm
from jaxllm.models.parameters import add_bias, matrix, project, project_all, vector
from jaxllm.models.rope import rotate
from pallas_kernels.attention import RangedAttention

Cache = dict[str, jax.Array]  # of one layer: "key" and "value", BSKH


class Attention(nnx.Module):
    """Projections, RoPE and the attention operation of one layer."""

    def __init__(
        self, config: ModelConfig, kernels: KernelsConfig, layer: Layer, key: jax.Array
    ):
        self.config, self.kernels, self.layer = config, kernels, layer
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
        if config.bias in ("attention", "all"):
            self.out_bias = vector(0.0, (d,), "D")
        if config.qk_norm and config.variant.qk_norm in ("heads", "rotated"):
            self.query_norm = HeadNorm(config, kernels)
            self.key_norm = HeadNorm(config, kernels)
        elif config.qk_norm:
            self.query_norm = AllHeadsNorm(config, "N")
            self.key_norm = AllHeadsNorm(config, "K")
        if config.variant.attention_sinks:
            self.sinks = vector(0.0, (n,), "N")

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the layer's output and the cache with this call's keys and values."""
        length = x_BTD.shape[1] if cache is None else cache["key"].shape[1]
        q_BTNH, k_BTKH, v_BTKH = self._heads(x_BTD, positions_BT, length)
        if cache is None:
            segments_BT = self._chunks(positions_BT, segments_BT)
            out_BTNH = self._attend_rows(q_BTNH, k_BTKH, v_BTKH, segments_BT)
        else:
            cache = {
                "key": _write(cache["key"], k_BTKH, positions_BT),
                "value": _write(cache["value"], v_BTKH, positions_BT),
            }
            out_BTNH = self._attend_cached(q_BTNH, cache, positions_BT)
        out_BTD = project("BTNH,NHD->BTD", out_BTNH, self.out[...], self.rematted)
        out_BTD = sharding.place_like(out_BTD, x_BTD)
        if self.config.bias in ("attention", "all"):
            out_BTD = add_bias(out_BTD, self.out_bias[...], "D")
        return checkpoint_name(out_BTD, "attention_out"), cache

    def _heads(self, x_BTD, positions_BT, length):
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
        before = self.config.variant.qk_norm != "rotated"
        if self.config.qk_norm and before:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        where = positions_BT, self.config, self.layer, length
        q_BTNH, k_BTKH = rotate(q_BTNH, *where), rotate(k_BTKH, *where)
        if self.config.qk_norm and not before and self.layer.rotates:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        q_BTNH = self._grow(q_BTNH, positions_BT)
        return (
            checkpoint_name(q_BTNH, "query"),
            checkpoint_name(k_BTKH, "key"),
            checkpoint_name(v_BTKH, "value"),
        )

    def _grow(self, q_BTNH, positions_BT):
        """Multiplies queries by 1 + b log(1 + position // original length)."""
        variant = self.config.variant
        growth, length, first = (
            (variant.query_growth, self.config.rope.original_length, 0)
            if self.layer.rotates or variant.query_growth
            else (variant.nope_growth, variant.nope_length, 1)
        )
        if not growth:
            return q_BTNH
        times_BT = (positions_BT + first if first else positions_BT) // length
        factor_BT = 1 + growth * jnp.log1p(times_BT.astype(jnp.float32))
        return (q_BTNH * factor_BT[:, :, None, None]).astype(q_BTNH.dtype)

    def _chunks(self, positions_BT, segments_BT):
        """Returns segments of which each is one chunk of a document."""
        if not (chunk := self._chunk):
            return segments_BT
        chunk_BT = positions_BT // chunk
        if segments_BT is None:
            return chunk_BT + 1
        number = positions_BT.shape[1] // chunk + 1  # of the chunks of a row, or more
        parts_BT = segments_BT * number + chunk_BT
        return jnp.where(segments_BT == 0, 0, parts_BT)  # padding stays padding

    @property
    def _chunk(self) -> int:
        return self.config.variant.attention_chunk if self.layer.rotates else 0

    def _attend_rows(self, q_BTNH, k_BSKH, v_BSKH, segments_BT):
        if sharding.axes_of("T"):
            return self._attend_shards(q_BTNH, k_BSKH, v_BSKH, segments_BT)
        masks = {} if segments_BT is None else {"segments_BT": segments_BT}
        return self._attend_locally(
            self.kernels.attention, q_BTNH, k_BSKH, v_BSKH, **masks
        )

    def _attend_shards(self, q_BTNH, k_BTKH, v_BTKH, segments_BT):
        attention = ContextAttention(
            self._ranged(self.kernels.attention),
            window=self.layer.window,
            exchange=self.kernels.context,
        )
        given = {} if segments_BT is None else {"segments_BT": ("BT", segments_BT)}
        if self.config.variant.attention_sinks:
            given["sinks_N"] = ("N", self.sinks[...])
        letters, arrays = zip(*given.values(), strict=True) if given else ((), ())

        def attend(q_BTNH, k_BTKH, v_BTKH, *arrays):
            named = dict(zip(given, arrays, strict=True))
            return attention(q_BTNH, k_BTKH, v_BTKH, **named)

        ins = ("BTNH", "BTKH", "BTKH", *letters)
        attend = sharding.local(attend, ins, "BTNH")
        return attend(q_BTNH, k_BTKH, v_BTKH, *arrays)

    def _ranged(self, implementation):
        return RangedAttention(
            softcap=self.config.attention_softcap,
            scale=self.config.variant.attention_scale,
            deterministic=self.kernels.deterministic,
            implementation=implementation,
        )

    def _attend_cached(self, q_BTNH, cache, positions_BT):
        # cuDNN takes no query positions, whatever it does in training.
        named = self.kernels.attention
        implementation = "xla" if named == "cudnn" else named
        if chunk := self._chunk:
            return self._attend_chunk(
                implementation,
                q_BTNH,
                cache,
                positions_BT // chunk * chunk,
                positions_BT,
            )
        return self._attend_locally(
            implementation,
            q_BTNH,
            cache["key"],
            cache["value"],
            positions_BT=positions_BT,
        )

    def _attend_chunk(self, implementation, q_BTNH, cache, first_BT, last_BT):
        """Attends to the slots of a cache from first_BT to last_BT."""

        def attend(q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT):
            ranged = self._ranged(implementation)
            return ranged.forward(q_BTNH, k_BSKH, v_BSKH, first_BT, last_BT + 1)[0]

        attend = sharding.local(attend, ("BTNH", "BSKH", "BSKH", "BT", "BT"), "BTNH")
        return attend(q_BTNH, cache["key"], cache["value"], first_BT, last_BT)

    def _attend_locally(self, implementation, q_BTNH, k_BSKH, v_BSKH, **masks_BT):
        sinks = {"sinks_N": self.sinks} if self.config.variant.attention_sinks else {}
        names = (*masks_BT, *sinks)

        def attention(q_BTNH, k_BSKH, v_BSKH, *arrays):
            return pallas_kernels.attention(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                **dict(zip(names, arrays, strict=True)),
                window=self.layer.window,
                softcap=self.config.attention_softcap,
                scale=self.config.variant.attention_scale,
                deterministic=self.kernels.deterministic,
                implementation=implementation,
            )

        ins = ("BTNH", "BSKH", "BSKH", *("BT" for _ in masks_BT), *("N" for _ in sinks))
        attention = sharding.local(attention, ins, "BTNH")
        vectors = (sinks_N[...] for sinks_N in sinks.values())
        return attention(q_BTNH, k_BSKH, v_BSKH, *masks_BT.values(), *vectors)


def _write(cache_BSKH, new_BTKH, positions_BT):
    def write(cache_BSKH, new_BTKH, positions_BT):
        rows_B1 = jnp.arange(cache_BSKH.shape[0])[:, None]
        return cache_BSKH.at[rows_B1, positions_BT].set(new_BTKH)

    ins = ("BSKH", "BTKH", "BT")
    return sharding.local(write, ins, "BSKH")(cache_BSKH, new_BTKH, positions_BT)

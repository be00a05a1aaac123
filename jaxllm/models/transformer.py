# SPDX-License-Identifier: Apache-2.0
"""The decoder: embedding, blocks, final norm, and the output projection's weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import sharding
from jaxllm.config import KernelsConfig, ModelConfig
from jaxllm.config.model import Layer
from jaxllm.models.attention import Attention, Cache
from jaxllm.models.mlp import MLP
from jaxllm.models.moe.layer import MoE
from jaxllm.models.moe.routing import Stats
from jaxllm.models.norms import Norm
from jaxllm.models.parameters import embed, matrix, stack
from jaxllm.models.pipeline import run_stages
from jaxllm.models.pipeline_schedule import Schedule

# By block of a period; stacked over periods by a scan. Those of leading layers are
# under LEADING, by layer.
Caches = dict[str, Any]
LEADING = "leading"

# What each policy keeps of a block's forward pass; the rest is recomputed.
SAVED_NAMES = {
    "full": (),
    "save_attention": ("attention", "attention_lse"),
    "dots": (
        "query",
        "key",
        "value",
        "attention",
        "attention_lse",
        "attention_out",
        "up",
        "gate",
        "mlp_out",
    ),
}


class Block(nnx.Module):
    """One layer: attention and MLP, with norms, beside the residual."""

    def __init__(
        self, config: ModelConfig, kernels: KernelsConfig, layer: Layer, key: jax.Array
    ):
        self.config = config
        variant = config.variant
        attention_key, mlp_key = jax.random.split(key)
        before = variant.norm_position != "post"
        if before:
            self.attention_norm = Norm(config, kernels)
        self.attention = Attention(config, kernels, layer, attention_key)
        if before and variant.parallel != "one_norm":
            self.mlp_norm = Norm(config, kernels)
        if layer.sparse:
            self.mlp = MoE(config, kernels, mlp_key)
        else:
            self.mlp = MLP(config, mlp_key)
        if variant.norm_position != "pre":
            self.attention_out_norm = Norm(config, kernels)
            self.mlp_out_norm = Norm(config, kernels)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        is_token_BT: jax.Array,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None, Stats]:
        variant, decoding = self.config.variant, cache is not None
        post = variant.norm_position == "post"
        with jax.named_scope("attention"):
            read_BTD = x_BTD if post else self.attention_norm(x_BTD)
            y_BTD, cache = self.attention(read_BTD, positions_BT, segments_BT, cache)
            y_BTD = self._finish(y_BTD, "attention_out_norm")
        with jax.named_scope("mlp"):
            if variant.parallel == "none":
                # The norm's kernel adds what comes before it in the same pass.
                read_BTD, x_BTD = (
                    (x_BTD + y_BTD,) * 2 if post else self.mlp_norm.add(x_BTD, y_BTD)
                )
            else:
                if variant.parallel == "two_norms":
                    read_BTD = self.mlp_norm(x_BTD)
                x_BTD = x_BTD + y_BTD
            y_BTD, stats = self._mlp(read_BTD, is_token_BT, decoding)
            y_BTD = self._finish(y_BTD, "mlp_out_norm")
        return checkpoint_name(x_BTD + y_BTD, "block"), cache, stats

    def _mlp(self, x_BTD, is_token_BT, decoding):
        if isinstance(self.mlp, MoE):
            return self.mlp(x_BTD, is_token_BT, drop=not decoding)
        return self.mlp(x_BTD), {}

    def _finish(self, y_BTD: jax.Array, norm: str) -> jax.Array:
        """Returns what is added to the residual stream, of a sublayer's output."""
        if self.config.variant.norm_position != "pre":
            y_BTD = getattr(self, norm)(y_BTD)
        if (scale := self.config.variant.residual_scale) != 1.0:
            y_BTD = (y_BTD * scale).astype(y_BTD.dtype)
        return y_BTD


class Period(nnx.Module):
    """The blocks between two layers of the same kind: what a scan repeats."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: KernelsConfig,
        layers: tuple[Layer, ...],
        keys: jax.Array,
    ):
        self.names = tuple(str(i) for i in range(len(layers)))
        for name, layer, key in zip(self.names, layers, keys, strict=True):
            setattr(self, name, Block(config, kernels, layer, key))

    def __call__(self, x_BTD, positions_BT, segments_BT, is_token_BT, cache):
        """Returns x after every block, each block's cache by its name, mean stats.

        The mean is over the blocks with experts.
        """
        caches, stats = {}, []
        for name in self.names:
            x_BTD, caches[name], of_block = getattr(self, name)(
                x_BTD,
                positions_BT,
                segments_BT,
                is_token_BT,
                None if cache is None else cache[name],
            )
            if of_block:
                stats.append(of_block)
        mean = {}
        if stats:
            mean = jax.tree.map(lambda *values: sum(values) / len(values), *stats)
        return x_BTD, (None if cache is None else caches, mean)


class Transformer(nnx.Module):
    """A decoder-only language model up to, not including, its logits."""

    def __init__(self, config: ModelConfig, kernels: KernelsConfig, key: jax.Array):
        self.config = config
        embed_key, blocks_key, output_key = jax.random.split(key, 3)
        v, d = config.vocab_size, config.d_model
        self.embedding = matrix(embed_key, (v, d), "VD", 0.02)
        keys = jax.random.split(blocks_key, config.num_layers)
        if config.leading:
            first, keys = keys[: len(config.leading)], keys[len(config.leading) :]
            self.leading = Period(config, kernels, config.leading, first)
        repeats = len(keys) // len(config.period)
        if config.scan_layers:
            make = functools.partial(Period, config, kernels, config.period)
            self.blocks = stack(make, keys.reshape(repeats, -1))
        else:
            self.blocks = Period(config, kernels, config.period * repeats, keys)
        if config.variant.positions:
            shape = (config.variant.positions, d)
            self.positions = matrix(jax.random.fold_in(key, 1), shape, "VD", 0.02)
        if config.variant.embedding_norm:
            self.embedding_norm = Norm(config, kernels)
        self.final_norm = Norm(config, kernels)
        if not config.tie_embeddings:
            self.output = matrix(output_key, (d, v), "DV", 0.02)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        cache: Caches | None = None,
    ) -> tuple[jax.Array, Caches | None]:
        """Returns the normed output x_BTD of the last block, and the filled cache.

        Args:
          tokens_BT: int32; where the mesh shards T, in the order that
            `sharding.to_zigzag` gives all these arrays.
          positions_BT: int32; the RoPE position of each token, and with a cache the
            slot where it is kept.
          segments_BT: int32 document of each token in a packed row; 0 is padding.
          cache: from `make_cache`; a token sees the slots up to its own position.
        """
        return self.run(tokens_BT, positions_BT, segments_BT, cache=cache)[:2]

    def run(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        is_token_BT: jax.Array | None = None,
        cache: Caches | None = None,
        schedule: Schedule | None = None,
        final_norm: bool = True,
    ) -> tuple[jax.Array, Caches | None, Stats]:
        """Returns what a call does, and the mean over layers of what `route` tells.

        Args:
          tokens_BT: and others as for a call.
          is_token_BT: bool, false for padding; None is where segments_BT says so.
          schedule: of a mesh with stages; the means then are one for each microbatch.
          final_norm: False returns the residual stream as it is.
        """
        if is_token_BT is None:
            known = segments_BT is not None
            is_token_BT = segments_BT > 0 if known else jnp.ones_like(tokens_BT, bool)
        with jax.named_scope("embedding"):
            x_BTD = self._embed(tokens_BT, positions_BT)
            # Tokens that are generated come one by one: nothing shards their T.
            table = sharding.COMPUTE if cache is not None else sharding.RESIDUAL
            x_BTD = sharding.constrain(x_BTD, "BTD", table)
        where = (positions_BT, segments_BT, is_token_BT)
        if schedule:
            x_BTD, stats = self._run_stages(schedule, x_BTD, where)
        else:
            x_BTD, cache, stats = self._run_blocks(x_BTD, where, cache)
        with jax.named_scope("final_norm"):
            if final_norm:
                x_BTD = self.final_norm(x_BTD)
                if (scale := self.config.variant.logit_scale) != 1.0:
                    x_BTD = (x_BTD * scale).astype(x_BTD.dtype)
            return sharding.constrain(x_BTD, "BTD"), cache, stats

    def _embed(self, tokens_BT, positions_BT):
        variant, dtype = self.config.variant, jnp.dtype(self.config.dtype)
        x_BTD = embed(tokens_BT, self.embedding[...], dtype)
        if variant.embedding_scale != 1.0:
            # Rounded to the dtype first, as the published models were trained.
            x_BTD = x_BTD * jnp.asarray(variant.embedding_scale, dtype)
        if variant.positions:
            x_BTD = x_BTD + embed(positions_BT, self.positions[...], dtype)
        if variant.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        return x_BTD

    def output_weights(self) -> tuple[jax.Array, str]:
        """Returns the parameter that maps x to logits, and its letters."""
        if self.config.tie_embeddings:
            return self.embedding[...], "VD"
        return self.output[...], "DV"

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Returns logits_BTV, float32 sums, for sampling; training never makes all."""
        w, letters = self.output_weights()
        used = sharding.gather(w, letters, x_BTD.dtype)
        logits_BTV = sharding.einsum(
            f"BTD,{letters}->BTV", x_BTD, used, dtype=jnp.float32
        )
        if (cap := self.config.logit_softcap) is not None:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        return logits_BTV

    def _run_blocks(self, x_BTD, where, cache):
        def run_period(x_BTD, period_and_cache):
            period, cache = period_and_cache
            return period(x_BTD, *where, cache)

        if axes := sharding.axes_of("P"):
            size = jax.sharding.get_abstract_mesh().shape[axes[0]]
            raise sharding.ShardingError(
                f"mesh {axes[0]}={size} cuts L (layers), and there is no schedule of "
                "them; give `run` that of `schedule_stages`, or use a mesh of stage=1."
            )
        scanned, leading = self.config.scan_layers, {}
        if self.config.leading:
            run = _with_remat(run_period, self.config, scanned=False)
            if cache is not None:
                cache = dict(cache)
                leading = {LEADING: cache.pop(LEADING)}
            x_BTD, (first, _) = run(x_BTD, (self.leading, leading.get(LEADING)))
            leading = {LEADING: first}
        run_period = _with_remat(run_period, self.config, scanned)
        if scanned:
            x_BTD, (cache, stats) = jax.lax.scan(
                run_period, x_BTD, (self.blocks, cache)
            )
            stats = jax.tree.map(jnp.mean, stats)
        else:
            x_BTD, (cache, stats) = run_period(x_BTD, (self.blocks, cache))
        return x_BTD, cache and {**leading, **cache}, stats

    def _run_stages(self, schedule, x_BTD, where):
        def run_period(period, x_BTD, where):
            x_BTD, (_, stats) = period(x_BTD, *where, None)
            return x_BTD, stats

        none = self.config.remat == "none"
        remat = functools.partial(_with_remat, config=self.config, scanned=True)
        remat = None if none else remat
        return run_stages(schedule, run_period, remat, self.blocks, x_BTD, where)


def make_cache(config: ModelConfig, batch: int, length: int) -> Caches:
    """Returns an empty KV cache for `length` positions, shaped as the blocks are.

    Raises:
      sharding.ShardingError: the mesh shards rows of tokens, which come one by one
        here, or layers, of which a token needs one after the other.
    """
    for letter, named in (("T", "tokens (T) one by one"), ("P", "layers (L) in turn")):
        for axis in sharding.axes_of(letter):
            size = jax.sharding.get_abstract_mesh().shape[axis]
            raise sharding.ShardingError(
                f"a KV cache takes {named}, which mesh {axis}={size} cuts; generate on "
                f"a mesh of {axis}=1, with tensor or fsdp instead."
            )
    num_leading, num_blocks = len(config.leading), len(config.period)
    repeats = (config.num_layers - num_leading) // num_blocks
    shape = (batch, length, config.num_kv_heads, config.head_dim)

    def zeros(shape, letters):
        empty = jnp.zeros(shape, jnp.dtype(config.dtype))
        return sharding.constrain(empty, letters)

    def caches(number, shape, letters):
        names = map(str, range(number))
        return {
            name: {"key": zeros(shape, letters), "value": zeros(shape, letters)}
            for name in names
        }

    leading = {LEADING: caches(num_leading, shape, "BSKH")} if num_leading else {}
    if config.scan_layers:
        return {**leading, **caches(num_blocks, (repeats, *shape), "LBSKH")}
    return {**leading, **caches(repeats * num_blocks, shape, "BSKH")}


def _with_remat(run: Callable, config: ModelConfig, scanned: bool) -> Callable:
    if config.remat == "none":
        return run
    names = SAVED_NAMES[config.remat]
    return jax.checkpoint(
        run,
        prevent_cse=not scanned,
        policy=jax.checkpoint_policies.save_only_these_names(*names),
    )

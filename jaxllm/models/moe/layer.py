# SPDX-License-Identifier: Apache-2.0
"""The feed-forward sublayer of routed experts."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import sharding
from jaxllm.config import KernelsConfig, ModelConfig
from jaxllm.config.model import PLAIN_MLPS
from jaxllm.models.mlp import MLP
from jaxllm.models.moe.experts import Experts, run_experts
from jaxllm.models.moe.routing import Stats, route
from jaxllm.models.parameters import matrix, vector


class MoE(nnx.Module):
    """A router, its experts, and shared experts that all tokens have.

    Source: Shazeer et al., "Outrageously Large Neural Networks" (arXiv:1701.06538);
    shared experts: Dai et al., "DeepSeekMoE" (arXiv:2401.06066).
    """

    def __init__(self, config: ModelConfig, kernels: KernelsConfig, key: jax.Array):
        self.config, self.kernels = config, kernels
        moe = config.moe
        e, d, f = moe.num_experts, config.d_model, config.d_ff_expert
        keys = jax.random.split(key, 5)
        self.router = matrix(keys[0], (d, e), "DR", 0.02)
        if moe.has_choice_bias:
            self.router_bias = vector(0.0, (e,), "R")
        if config.bias == "all":
            # E, not R: it is trained by the loss, as no balancing bias is.
            self.router_logit_bias = vector(0.0, (e,), "E")
            self.up_bias = vector(0.0, (e, f), "EF")
            self.down_bias = vector(0.0, (e, d), "ED")
            if config.mlp not in PLAIN_MLPS:
                self.gate_bias = vector(0.0, (e, f), "EF")
        self.up = matrix(keys[1], (e, d, f), "EDF", d**-0.5)
        if config.mlp not in PLAIN_MLPS:
            self.gate = matrix(keys[2], (e, d, f), "EDF", d**-0.5)
        std = f**-0.5 * (2 * config.num_layers) ** -0.5
        self.down = matrix(keys[3], (e, f, d), "EFD", std)
        if moe.num_shared_experts:
            # As one: they all have every token.
            width = moe.num_shared_experts * config.d_ff_shared
            self.shared = MLP(config, keys[4], width)
        if moe.variant.shared_gate:
            self.shared_gate = matrix(jax.random.fold_in(key, 1), (d,), "D", 0.02)

    def __call__(
        self, x_BTD: jax.Array, is_token_BT: jax.Array, *, drop: bool
    ) -> tuple[jax.Array, Stats]:
        """Returns the layer's output and what `route` says of it.

        Args:
          x_BTD: normed input, which the output lies like.
          is_token_BT: false for padding, whose output is that of shared experts only.
          drop: whether the capacity holds; decoding sees too few tokens for it.
        """
        moe = self.config.moe
        whole_BTD = sharding.constrain(x_BTD, "BTD")
        capacity = self._capacity(x_BTD.shape[1]) if drop else None
        bias_R = self.router_bias[...] if moe.has_choice_bias else None
        with jax.named_scope("router"):
            logits_BTR = self._logits(whole_BTD)
            routes, stats = route(logits_BTR, bias_R, is_token_BT, moe, capacity)
        experts = Experts(
            num_experts=moe.num_experts,
            activation=self.config.mlp,
            capacity=capacity,
            implementation=self.kernels.grouped_matmul,
            limit=self.config.variant.mlp_limit,
            share_of=moe.variant.share_of,
        )
        weights = {"up": self.up[...], "down": self.down[...]}
        if self.config.mlp not in PLAIN_MLPS:
            weights["gate"] = self.gate[...]
        if self.config.bias == "all":
            weights |= {f"{x}_bias": getattr(self, f"{x}_bias")[...] for x in weights}
        with jax.named_scope("experts"):
            out_BTD = run_experts(
                experts, whole_BTD, routes.share_BTA, routes.choice_BTA, weights
            )
            out_BTD = sharding.place_like(out_BTD, x_BTD)
        if moe.num_shared_experts:
            with jax.named_scope("shared_experts"):
                out_BTD = out_BTD + self._shared(x_BTD)
        return checkpoint_name(out_BTD, "mlp_out"), stats

    def _shared(self, x_BTD):
        out_BTD = self.shared(x_BTD)
        if not self.config.moe.variant.shared_gate:
            return out_BTD
        gate_D = sharding.gather(self.shared_gate[...], "D", jnp.float32)
        gate_BT = jax.nn.sigmoid(
            (x_BTD.astype(jnp.float32) * gate_D[None, None]).sum(-1)
        )
        return (out_BTD * gate_BT[:, :, None]).astype(out_BTD.dtype)

    def _logits(self, x_BTD):
        router_DR = sharding.gather(self.router[...], "DR", jnp.float32)
        # GPUs would round both to TF32, and near scores would change places.
        logits_BTR = jnp.einsum(
            "BTD,DR->BTR",
            x_BTD.astype(jnp.float32),
            router_DR,
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=sharding.out_sharding("BTR"),
        )
        if self.config.bias == "all":
            bias = sharding.gather(self.router_logit_bias[...], "E", jnp.float32)
            logits_BTR = logits_BTR + sharding.constrain(bias, "R")[None, None]
        return logits_BTR

    def _capacity(self, num_tokens: int) -> int | None:
        moe = self.config.moe
        if moe.capacity_factor is None:
            return None
        if sharding.axes_of("T"):
            raise ValueError(
                f"config.model.moe.capacity_factor={moe.capacity_factor} counts the "
                "tokens of a row, which a mesh with a context axis cuts; use "
                "config.model.moe.capacity_factor=None."
            )
        even = num_tokens * moe.experts_per_token / moe.num_experts
        return min(math.ceil(moe.capacity_factor * even), num_tokens)

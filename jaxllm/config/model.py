# SPDX-License-Identifier: Apache-2.0
"""The settings of the model, with their checks. Standard library only."""

import dataclasses
from typing import Literal

from jaxllm.config.checks import (
    check_not_negative,
    check_positive,
    divisors,
    neighbours,
)
from jaxllm.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts in place of every layer's MLP, if num_experts is set."""

    num_experts: int = 0  # MLPs of a layer that a router picks from; 0 is one dense MLP
    experts_per_token: int = 1  # experts that each token is sent to
    d_ff_expert: int = 0  # hidden width of an expert; 0 is d_ff
    num_shared_experts: int = 0  # experts beside them that every token is sent to
    router: Literal["softmax", "sigmoid"] = "softmax"  # makes scores of its logits
    renormalize: bool = False  # scores of a token's experts are divided by their sum
    balance: Literal["none", "loss", "bias"] = "none"  # what evens out experts' loads
    balance_weight: float = 0.01  # times the loss; what a bias changes by in a step
    router_z_loss: float = 0.0  # times the squared log of the softmax's denominator
    capacity_factor: float | None = None  # even loads of a row that fit; None: all

    def __post_init__(self):
        check_positive(self, "model.moe", "experts_per_token capacity_factor")
        check_not_negative(
            self,
            "model.moe",
            "num_experts d_ff_expert num_shared_experts balance_weight router_z_loss",
        )
        if not self.num_experts:
            self._check_dense()
            return
        if self.experts_per_token > self.num_experts:
            raise InputError(
                f"config.model.moe.experts_per_token={self.experts_per_token} must not "
                f"be above config.model.moe.num_experts={self.num_experts}."
            )
        if self.renormalize and self.experts_per_token == 1:
            raise InputError(
                "config.model.moe.renormalize=True makes every score 1 with "
                "config.model.moe.experts_per_token=1, and the router would learn "
                "nothing; use config.model.moe.renormalize=False or more experts."
            )
        if self.router_z_loss and self.router == "sigmoid":
            raise InputError(
                f"config.model.moe.router_z_loss={self.router_z_loss} needs the "
                "denominator of a softmax; use config.model.moe.router=softmax or 0."
            )

    def _check_dense(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                raise InputError(
                    f"config.model.moe.{field.name}={value} needs experts, but "
                    "config.model.moe.num_experts=0 makes every layer dense; set it."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer."""

    vocab_size: int  # rows of the embedding; at least the tokenizer's vocabulary
    num_layers: int  # transformer blocks; a multiple of len(windows)
    d_model: int  # width of the residual stream
    num_heads: int  # query heads
    num_kv_heads: int  # key/value heads; must divide num_heads
    head_dim: int  # width of a head; even, for RoPE
    d_ff: int  # hidden width of the MLP
    mlp: Literal["swiglu", "geglu", "gelu"] = "swiglu"  # gated by SiLU, GELU; plain
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # before each sublayer, and last
    norm_eps: float = 1e-6  # added to the variance
    bias: Literal["none", "qkv", "all"] = "none"  # which projections have one
    qk_norm: bool = False  # RMSNorm over each query and key head, before RoPE
    tie_embeddings: bool = False  # the output projection is the embedding, transposed
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    windows: tuple[int, ...] = (0,)  # keys seen per layer of a period; 0 is all of them
    attention_softcap: float | None = None  # c * tanh(logits / c) in attention
    logit_softcap: float | None = None  # the same on the output logits
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations and matmuls
    remat: Literal["none", "full", "dots", "save_attention"] = "none"  # what is kept
    scan_layers: bool = True  # compile one period of layers, or every layer
    moe: MoEConfig = MoEConfig()  # experts in place of the MLP

    def __post_init__(self):
        check_positive(
            self,
            "model",
            "vocab_size num_layers d_model num_heads num_kv_heads head_dim d_ff "
            "norm_eps rope_theta attention_softcap logit_softcap",
        )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"config.model.num_kv_heads={self.num_kv_heads} must divide "
                f"config.model.num_heads={self.num_heads}; use one of "
                f"{divisors(self.num_heads)}."
            )
        if self.head_dim % 2:
            raise InputError(
                f"config.model.head_dim={self.head_dim} must be even, because RoPE "
                f"rotates pairs; use {self.head_dim - 1} or {self.head_dim + 1}."
            )
        if not self.windows or min(self.windows) < 0:
            raise InputError(
                f"config.model.windows={self.windows} must hold at least one number of "
                "keys, 0 for all of them; use (0,) for full attention in every layer."
            )
        if self.num_layers % len(self.windows):
            raise InputError(
                f"config.model.num_layers={self.num_layers} must be a multiple of the "
                f"{len(self.windows)} entries of config.model.windows={self.windows}; "
                f"use {neighbours(self.num_layers, len(self.windows))} layers."
            )
        if self.moe.num_experts and self.bias == "all":
            raise InputError(
                "config.model.bias=all is not for experts, which have no biases; use "
                "config.model.bias=qkv or none."
            )

    @property
    def d_ff_expert(self) -> int:
        """The hidden width of an expert."""
        return self.moe.d_ff_expert or self.d_ff

# SPDX-License-Identifier: Apache-2.0
"""The settings of the model, with their checks. Standard library only."""

import dataclasses
import math
from typing import Literal

from jaxllm.config.checks import (
    MAX_COUNT,
    MAX_WIDTH,
    check_at_most,
    check_positive,
    divisors,
    neighbours,
)
from jaxllm.config.moe import MoEConfig
from jaxllm.config.variant import RopeConfig, VariantConfig
from jaxllm.errors import InputError

Bias = Literal["none", "qkv", "attention", "all"]
MLP = Literal["swiglu", "geglu", "swiglu_clamped", "gelu", "gelu_exact", "relu2"]
PLAIN_MLPS = ("gelu", "gelu_exact", "relu2")  # without a gate
Dtype = Literal["bfloat16", "float32"]
Remat = Literal["none", "full", "dots", "save_attention"]

MAX_UNROLLED = 128  # layers that are traced one by one
MAX_MATRIX = 2**40  # numbers of a parameter of one layer: 4 TiB


@dataclasses.dataclass(frozen=True)
class Layer:
    """What differs from layer to layer."""

    window: int  # keys in sight; 0: all
    rotates: bool  # has RoPE
    sparse: bool  # has experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and numerics of a decoder-only transformer."""

    vocab_size: int  # rows of the embedding; at least the tokenizer's vocabulary
    num_layers: int  # transformer blocks; a multiple of len(windows)
    d_model: int  # width of the residual stream
    num_heads: int  # query heads
    num_kv_heads: int  # key/value heads (GQA, MQA); must divide num_heads
    head_dim: int  # width of a head; even, for RoPE
    d_ff: int  # hidden width of the MLP
    mlp: MLP = "swiglu"  # gated: swiglu, geglu, swiglu_clamped; plain: the others
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # type of all pre-norms
    norm_eps: float = 1e-6  # added to the variance in every norm
    bias: Bias = "none"  # projections that have a bias; attention: qkv and its output
    qk_norm: bool = False  # RMSNorm over each query and key head, before RoPE
    tie_embeddings: bool = False  # share the embedding with the output projection
    rope_theta: float = 10_000.0  # base of the rotary position embedding's frequencies
    windows: tuple[int, ...] = (0,)  # attention window of each layer, cyclic; 0: full
    attention_softcap: float | None = None  # soft cap c of logits: c * tanh(x / c)
    logit_softcap: float | None = None  # the same soft cap, for the output logits
    dtype: Dtype = "bfloat16"  # dtype of activations and matmuls; weights are float32
    remat: Remat = "none"  # recomputation in backward; none: nothing, full: all
    scan_layers: bool = True  # compile one period of layers and scan; false: unroll
    moe: MoEConfig = dataclasses.field(
        default_factory=MoEConfig
    )  # mixture of experts in place of the MLP
    rope: RopeConfig = dataclasses.field(
        default_factory=RopeConfig
    )  # rotary position embedding, beyond its theta
    variant: VariantConfig = dataclasses.field(
        default_factory=VariantConfig
    )  # parts of published model families

    def __post_init__(self):
        check_positive(
            self,
            "model",
            "vocab_size num_layers d_model num_heads num_kv_heads head_dim d_ff "
            "norm_eps rope_theta attention_softcap logit_softcap",
        )
        check_at_most(
            self,
            "model",
            num_layers=MAX_COUNT,
            num_heads=MAX_COUNT,
            d_model=MAX_WIDTH,
            d_ff=MAX_WIDTH,
            head_dim=MAX_WIDTH,
        )
        if self.rope_theta < 1:
            raise InputError(
                f"config.model.rope_theta={self.rope_theta} must be at least 1, "
                "usually 10000 or more: positions would turn heads by more than 1."
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
                f"config.model.windows={self.windows} must have an entry, in keys; "
                "0 is all of them; use (0,) for full attention in every layer."
            )
        self._check_layers()
        self._check_size()
        self._check_rope()
        if self.moe.variant.share_of == "input" and self.bias == "all":
            raise InputError(
                "config.model.moe.variant.share_of=input is not for experts with "
                "biases; use config.model.bias=attention, or share_of=output."
            )
        if self.variant.attention_chunk and (
            any(self.windows) or self.variant.attention_sinks
        ):
            raise InputError(
                f"config.model.variant.attention_chunk={self.variant.attention_chunk} "
                "is not for config.model.windows or config.model.variant."
                "attention_sinks; use one of them."
            )
        if (self.mlp == "swiglu_clamped") != (self.variant.mlp_limit is not None):
            raise InputError(
                f"config.model.variant.mlp_limit={self.variant.mlp_limit} goes with "
                f"config.model.mlp=swiglu_clamped, and this is {self.mlp}; set both, "
                "or neither."
            )

    def _check_layers(self):
        first = self.moe.variant.first_dense
        if first >= self.num_layers:
            raise InputError(
                f"config.model.moe.variant.first_dense={first} leaves none of "
                f"config.model.num_layers={self.num_layers} with experts; use at most "
                f"{self.num_layers - 1}, or config.model.moe.num_experts=0."
            )
        behind = f" less config.model.moe.variant.first_dense={first}" if first else ""
        number = self.num_layers - first
        for name, entries in self._cycles.items():
            if number % len(entries):
                counts = neighbours(number, len(entries)).split(" or ")
                fits = " or ".join(str(int(count) + first) for count in counts)
                raise InputError(
                    f"config.model.num_layers={self.num_layers}{behind} must be a "
                    f"multiple of the {len(entries)} entries of "
                    f"config.model.{name}={entries}; use {fits} layers."
                )

    def _check_size(self):
        repeated = len(self.period) if self.scan_layers else self.num_layers
        unrolled = repeated + (len(self.leading) if self.scan_layers else 0)
        if unrolled > MAX_UNROLLED:
            raise InputError(
                f"config.model.num_layers={self.num_layers} with "
                f"config.model.scan_layers={self.scan_layers} and "
                f"{len(self.windows)} config.model.windows would compile {unrolled} "
                f"layers one by one, of at most {MAX_UNROLLED}; use "
                "config.model.scan_layers=True and fewer windows."
            )
        moe = self.moe
        columns = {
            "vocab_size": self.vocab_size,
            "num_heads * head_dim": self.num_heads * self.head_dim,
            "d_ff": self.d_ff,
            "num_experts * d_ff_expert": moe.num_experts * self.d_ff_expert,
            "num_shared_experts * d_ff_shared": (
                moe.num_shared_experts * self.d_ff_shared
            ),
        }
        for names, size in columns.items():
            if self.d_model * size > MAX_MATRIX:
                raise InputError(
                    f"config.model.d_model={self.d_model} times {names}={size} makes "
                    f"a parameter of {self.d_model * size} numbers, of at most "
                    f"{MAX_MATRIX}; lower one of them."
                )

    def _check_rope(self):
        dims = self.rope.dims or self.head_dim
        if dims > self.head_dim:
            raise InputError(
                f"config.model.rope.dims={dims} must not be above "
                f"config.model.head_dim={self.head_dim}."
            )
        for name in ("short_factors", "long_factors"):
            if (number := len(getattr(self.rope, name))) not in (0, dims // 2):
                raise InputError(
                    f"config.model.rope.{name} has {number} numbers, and there are "
                    f"{dims // 2} frequencies; give one for each."
                )

    @property
    def _cycles(self) -> dict[str, tuple]:
        """What differs from layer to layer, by the name of its setting."""
        return {
            "windows": self.windows,
            "rope.layers": self.rope.layers,
            "moe.variant.layers": self.moe.variant.layers,
        }

    def layer(self, number: int) -> Layer:
        """Returns the kind of a layer, of which the first has the number 0."""
        window, rotates, sparse = (
            entries[number % len(entries)] for entries in self._cycles.values()
        )
        if not self.moe.num_experts or number < self.moe.variant.first_dense:
            sparse = False
        return Layer(window, rotates, sparse)

    @property
    def leading(self) -> tuple[Layer, ...]:
        """The layers in front of those whose kinds repeat."""
        return tuple(
            self.layer(number) for number in range(self.moe.variant.first_dense)
        )

    @property
    def period(self) -> tuple[Layer, ...]:
        """The layers behind the leading ones, up to where their kinds begin again."""
        size = math.lcm(*map(len, self._cycles.values()))
        first = self.moe.variant.first_dense
        return tuple(self.layer(number) for number in range(first, first + size))

    @property
    def num_sparse_layers(self) -> int:
        """How many layers have experts."""
        repeats = (self.num_layers - self.moe.variant.first_dense) // len(self.period)
        return repeats * sum(layer.sparse for layer in self.period)

    @property
    def d_ff_expert(self) -> int:
        """The hidden width of an expert."""
        return self.moe.d_ff_expert or self.d_ff

    @property
    def d_ff_shared(self) -> int:
        """The hidden width of a shared expert."""
        return self.moe.variant.d_ff_shared or self.d_ff_expert

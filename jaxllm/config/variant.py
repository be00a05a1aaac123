# SPDX-License-Identifier: Apache-2.0
"""What published families of models have beyond the plain block. Standard library only.

An import of a model sets these; a model that is trained from scratch leaves them alone.
"""

import dataclasses
import math
from typing import Literal

from jaxllm.config.checks import check_not_negative, check_positive
from jaxllm.errors import InputError

Scaling = Literal["none", "linear", "llama3", "yarn", "longrope"]
QKNorm = Literal["heads", "flat", "rotated", "layernorm"]  # rotated: behind RoPE
NormPosition = Literal["pre", "post", "both"]
Parallel = Literal["none", "one_norm", "two_norms"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, beyond model.rope_theta."""

    dims: int = 0  # leading dimensions of a head that are rotated; 0: all of them
    interleaved: bool = False  # rotate neighbouring pairs; false: pairs across halves
    reversed: bool = False  # turn heads by the negative of the position
    layers: tuple[bool, ...] = (True,)  # whether RoPE is in each layer, cyclic
    window_theta: float | None = None  # theta of layers with a window; None: rope_theta
    scaling: Scaling = "none"  # scaling of the frequencies to longer rows
    factor: float = 1.0  # length after the scaling / original_length
    original_length: int = 0  # row length before the scaling, in tokens
    slow: float = 1.0  # yarn, llama3: turns in original_length below which to scale
    fast: float = 32.0  # yarn, llama3: turns in original_length above which to keep
    truncate: bool = True  # yarn: round the two borders to whole frequencies
    magnitude: float | None = None  # yarn, longrope: multiplies cos, sin; None: 1
    short_factors: tuple[float, ...] = ()  # longrope: divide frequencies of short rows
    long_factors: tuple[float, ...] = ()  # longrope: of rows above original_length

    def __post_init__(self):
        check_not_negative(self, "model.rope", "dims original_length slow")
        check_positive(self, "model.rope", "window_theta factor fast magnitude")
        if self.dims % 2:
            raise InputError(
                f"config.model.rope.dims={self.dims} must be even, because RoPE "
                f"rotates pairs; use {self.dims - 1} or {self.dims + 1}."
            )
        if not self.layers:
            raise InputError(
                "config.model.rope.layers=() must have an entry; use (True,) for RoPE "
                "in every layer."
            )
        if self.scaling in ("llama3", "yarn", "longrope") and not self.original_length:
            raise InputError(
                f"config.model.rope.scaling={self.scaling} needs "
                "config.model.rope.original_length, the row length before it."
            )
        if self.scaling in ("llama3", "yarn") and self.slow >= self.fast:
            raise InputError(
                f"config.model.rope.slow={self.slow} must be below "
                f"config.model.rope.fast={self.fast}."
            )
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            if bool(factors) != (self.scaling == "longrope"):
                raise InputError(
                    f"config.model.rope.{name} has {len(factors)} numbers; scaling="
                    "longrope needs one for each frequency, and no other takes them."
                )
            if not all(math.isfinite(each) and each > 0 for each in factors):
                raise InputError(f"config.model.rope.{name} must all be above 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """Parts of published model families beyond the plain block."""

    attention_scale: float | None = None  # multiplies the logits; None: head_dim**-0.5
    attention_sinks: bool = False  # a trained logit for each head, without a value
    qk_norm: QKNorm = "heads"  # kind of model.qk_norm
    norm_position: NormPosition = "pre"  # norms before sublayers, on outputs, or both
    parallel: Parallel = "none"  # attention and MLP of the same input, and its norms
    norm_offset: bool = False  # norms multiply by 1 + scale
    norm_scale: bool = True  # norms have a scale
    norm_bias: bool = True  # LayerNorm has a bias
    embedding_scale: float = 1.0  # multiplies the embedding
    embedding_norm: bool = False  # a norm behind the embedding
    residual_scale: float = 1.0  # multiplies the output of every sublayer
    logit_scale: float = 1.0  # multiplies the output logits
    mlp_limit: float | None = None  # swiglu_clamped: largest gate and |up|
    positions: int = 0  # learned position embeddings, for rows up to this; 0: none
    query_growth: float = 0.0  # b of 1 + b log(1 + position // rope.original_length)
    nope_growth: float = 0.0  # b of 1 + b log(1 + (position + 1) // nope_length)
    nope_length: int = 8192  # tokens of a step of nope_growth, in layers without RoPE
    attention_chunk: int = 0  # layers with RoPE see so many positions a chunk; 0: all

    def __post_init__(self):
        check_not_negative(
            self,
            "model.variant",
            "positions query_growth nope_growth attention_chunk",
        )
        check_positive(
            self,
            "model.variant",
            "attention_scale embedding_scale residual_scale logit_scale mlp_limit "
            "nope_length",
        )
        if self.parallel != "none" and self.norm_position != "pre":
            raise InputError(
                f"config.model.variant.parallel={self.parallel} is for "
                "config.model.variant.norm_position=pre only."
            )

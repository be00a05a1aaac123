# SPDX-License-Identifier: Apache-2.0
"""Model sizes: each function returns a ModelConfig, with any of its fields changed.

    presets.llama_1b(vocab_size=50_304, remat="full")

The numbers of parameters are those of the preset as it is.
"""

import dataclasses
from typing import Any

from jaxllm.config.model import ModelConfig
from jaxllm.config.moe import MoEConfig


def tiny_1m(**changes: Any) -> ModelConfig:
    """920,704 parameters, for a CPU; the 257 tokens of bytes, rounded up for meshes."""
    model = ModelConfig(
        vocab_size=264,
        num_layers=4,
        d_model=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=384,
    )
    return dataclasses.replace(model, **changes)


def small_15m(**changes: Any) -> ModelConfig:
    """15,191,712 parameters: the shape of stories15M in Karpathy's llama2.c."""
    model = ModelConfig(
        vocab_size=32_000,
        num_layers=6,
        d_model=288,
        num_heads=6,
        num_kv_heads=6,
        head_dim=48,
        d_ff=768,
        norm_eps=1e-5,
        tie_embeddings=True,
    )
    return dataclasses.replace(model, **changes)


def base_124m(**changes: Any) -> ModelConfig:
    """123,689,472 parameters: GPT-2 small with RoPE for its 786,432 positions.

    The vocabulary is GPT-2's 50,257, rounded up so that 8 and 128 divide it.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners".
    """
    model = ModelConfig(
        vocab_size=50_304,
        num_layers=12,
        d_model=768,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        d_ff=3072,
        mlp="gelu",
        norm="layernorm",
        norm_eps=1e-5,
        bias="all",
        tie_embeddings=True,
    )
    return dataclasses.replace(model, **changes)


def llama_350m(**changes: Any) -> ModelConfig:
    """367,969,280 parameters.

    Source: the 350M model of Zhao et al., "GaLore" (arXiv:2403.03507).
    """
    model = ModelConfig(
        vocab_size=32_000,
        num_layers=24,
        d_model=1024,
        num_heads=16,
        num_kv_heads=16,
        head_dim=64,
        d_ff=2736,
    )
    return dataclasses.replace(model, **changes)


def llama_1b(**changes: Any) -> ModelConfig:
    """1,235,814,400 parameters: the shape of Llama 3.2 1B.

    Without the scaling of its rotary frequencies, which is for rows above 8192 tokens.
    """
    model = llama_8b(
        num_layers=16,
        d_model=2048,
        head_dim=64,
        d_ff=8192,
        tie_embeddings=True,
    )
    return dataclasses.replace(model, **changes)


def llama_3b(**changes: Any) -> ModelConfig:
    """3,212,749,824 parameters: the shape of Llama 3.2 3B, like `llama_1b`."""
    model = llama_8b(
        num_layers=28,
        d_model=3072,
        num_heads=24,
        d_ff=8192,
        tie_embeddings=True,
    )
    return dataclasses.replace(model, **changes)


def llama_8b(**changes: Any) -> ModelConfig:
    """8,030,261,248 parameters: Llama 3 8B.

    Source: Grattafiori et al., "The Llama 3 Herd of Models" (arXiv:2407.21783).
    """
    model = ModelConfig(
        vocab_size=128_256,
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=14_336,
        norm_eps=1e-5,
        rope_theta=500_000.0,
    )
    return dataclasses.replace(model, **changes)


def llama_70b(**changes: Any) -> ModelConfig:
    """70,553,706,496 parameters: Llama 3 70B. Source: as `llama_8b`."""
    model = llama_8b(num_layers=80, d_model=8192, num_heads=64, d_ff=28_672)
    return dataclasses.replace(model, **changes)


def qwen3_0_6b(**changes: Any) -> ModelConfig:
    """596,049,920 parameters: Qwen3 0.6B.

    Source: Yang et al., "Qwen3 Technical Report" (arXiv:2505.09388), table 1.
    """
    model = ModelConfig(
        vocab_size=151_936,
        num_layers=28,
        d_model=1024,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        d_ff=3072,
        qk_norm=True,
        tie_embeddings=True,
        rope_theta=1_000_000.0,
    )
    return dataclasses.replace(model, **changes)


def tiny_moe_3m(**changes: Any) -> ModelConfig:
    """2,694,272 parameters: `tiny_1m` with experts; a token uses 924,800."""
    moe = MoEConfig(
        num_experts=8,
        experts_per_token=2,
        d_ff_expert=192,
        renormalize=True,
        balance="loss",
        router_z_loss=1e-3,
    )
    return dataclasses.replace(tiny_1m(moe=moe), **changes)


def mixtral_8x7b(**changes: Any) -> ModelConfig:
    """46,702,792,704 parameters; a token uses 12,879,925,248.

    Source: Jiang et al., "Mixtral of Experts" (arXiv:2401.04088), table 1.
    """
    model = llama_8b(
        vocab_size=32_000,
        rope_theta=1_000_000.0,
        moe=MoEConfig(
            num_experts=8,
            experts_per_token=2,
            renormalize=True,
            balance="loss",
            balance_weight=0.02,
        ),
    )
    return dataclasses.replace(model, **changes)


def qwen3_30b_a3b(**changes: Any) -> ModelConfig:
    """30,532,122,624 parameters; a token uses 3,353,032,704.

    Source: Yang et al., "Qwen3 Technical Report" (arXiv:2505.09388), table 2; the
    widths are those of its published config.
    """
    model = ModelConfig(
        vocab_size=151_936,
        num_layers=48,
        d_model=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        d_ff=6144,
        qk_norm=True,
        rope_theta=1_000_000.0,
        moe=MoEConfig(
            num_experts=128,
            experts_per_token=8,
            d_ff_expert=768,
            renormalize=True,
            balance="loss",
            balance_weight=0.001,
        ),
    )
    return dataclasses.replace(model, **changes)


def gemma_like_1b(**changes: Any) -> ModelConfig:
    """946,146,432 parameters: five layers of local attention to each global one.

    The shape of Gemma 3 1B with 24 layers, which are whole periods, for its 26; without
    its norms after the sublayers, its scaled embedding and its second rope_theta.

    Source: Gemma Team, "Gemma 3 Technical Report" (arXiv:2503.19786).
    """
    model = ModelConfig(
        vocab_size=262_144,
        num_layers=24,
        d_model=1152,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        d_ff=6912,
        mlp="geglu",
        qk_norm=True,
        tie_embeddings=True,
        rope_theta=1_000_000.0,
        windows=(512, 512, 512, 512, 512, 0),
    )
    return dataclasses.replace(model, **changes)

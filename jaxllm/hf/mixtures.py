# SPDX-License-Identifier: Apache-2.0
"""Families of mixtures of experts."""

from collections.abc import Mapping

from jaxllm.hf.table import (
    ATTENTION_BIASES,
    BASE,
    EXPERTS,
    FLAT_NORMS,
    FUSED_EXPERTS,
    GRANITE_BASE,
    GRANITE_KEYS,
    KEYS,
    LAYER,
    LLAMA,
    LOCAL_EXPERTS,
    PRE_NORMS,
    SILU,
    Family,
    Tensor,
    attention,
    ends,
    experts,
    mlp,
)

MIXTRAL_EXPERTS = experts(
    "block_sparse_moe.gate.weight", "block_sparse_moe.experts.{e}.", "w1", "w3", "w2"
)

MIXTURES: Mapping[str, Family] = {
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        fixed={"moe.router": "softmax", "moe.renormalize": True},
        keys=KEYS | LOCAL_EXPERTS,
        defaults=BASE
        | dict(
            rms_norm_eps=1e-5,
            rope_theta=1_000_000.0,
            sliding_window=None,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        windows="always",
        activations=SILU,
        tensors=LLAMA | MIXTRAL_EXPERTS,
    ),
    "minimax_m2": Family(
        architecture="MiniMaxM2ForCausalLM",
        fixed={
            "variant.qk_norm": "flat",
            "qk_norm": True,
            "moe.router": "sigmoid",
            "moe.renormalize": True,
            "moe.variant.choice_bias": True,
        },
        keys=KEYS | LOCAL_EXPERTS,
        defaults=BASE
        | dict(
            head_dim=128,
            rope_theta=5_000_000.0,
            partial_rotary_factor=1.0,
            rotary_dim=None,
            num_local_experts=256,
            num_experts_per_tok=8,
        ),
        activations=SILU,
        # Keys of the published files, which transformers does not read.
        requires={
            "use_qk_norm": (True,),
            "qk_norm_type": ("per_layer",),
            "scoring_func": ("sigmoid",),
            "use_routing_bias": (True,),
            "shared_intermediate_size": (0,),
            "layernorm_full_attention_beta": (1.0,),
            "layernorm_mlp_beta": (1.0,),
            "sliding_window": (None,),
        },
        ignored=(
            *("attn_type_list", "layernorm_linear_attention_beta", "shared_moe_mode"),
            *("mlp_intermediate_size", "mtp_transformer_layers", "num_mtp_modules"),
            "use_mtp",
        ),
        tensors=LLAMA
        | FLAT_NORMS
        | MIXTRAL_EXPERTS
        | {
            "mlp/router_bias": Tensor(
                LAYER + "block_sparse_moe.e_score_correction_bias", "R"
            )
        },
        skipped=(r".*mtp.*",),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        fixed={"qk_norm": True},
        keys=KEYS
        | {
            "moe.num_experts": "num_experts",
            "moe.experts_per_token": "num_experts_per_tok",
            "moe.d_ff_expert": "moe_intermediate_size",
            "moe.renormalize": "norm_topk_prob",
        },
        aliases={"num_experts": "num_local_experts"},
        defaults=BASE
        | dict(
            sliding_window=None,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=False,
        ),
        windows="always",
        activations=SILU,
        requires={"attention_bias": (False,)},
        ignored=("max_window_layers",),
        sparse="unlisted",
        tensors=LLAMA | EXPERTS | mlp(ours="dense/"),
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        fixed={"variant.qk_norm": "flat", "qk_norm": True},
        keys=KEYS
        | {
            "moe.num_experts": "num_experts",
            "moe.experts_per_token": "num_experts_per_tok",
            "moe.renormalize": "norm_topk_prob",
        },
        defaults=BASE
        | dict(
            rms_norm_eps=1e-5,
            num_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=False,
        ),
        activations=SILU,
        requires={"attention_bias": (False,), "clip_qkv": (None,)},
        tensors=LLAMA | FLAT_NORMS | EXPERTS,
    ),
    "granitemoe": Family(
        architecture="GraniteMoeForCausalLM",
        # Top-k of the logits, then a softmax of those: a softmax renormalised.
        fixed={"moe.router": "softmax", "moe.renormalize": True},
        keys=KEYS | GRANITE_KEYS | LOCAL_EXPERTS,
        defaults=GRANITE_BASE
        | dict(
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        activations=SILU,
        biases=ATTENTION_BIASES,
        tensors=LLAMA | FUSED_EXPERTS,
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        # Top-k of the logits, then a softmax of those: a softmax renormalised.
        fixed={
            "moe.router": "softmax",
            "moe.renormalize": True,
            "variant.attention_sinks": True,
        },
        keys=KEYS
        | LOCAL_EXPERTS
        | {
            "variant.mlp_limit": "swiglu_limit",
        },
        aliases={"num_experts_per_tok": "experts_per_token"},
        defaults=BASE
        | dict(
            rms_norm_eps=1e-5,
            rope_theta=150_000.0,
            rope_parameters=dict(
                rope_type="yarn",
                factor=32.0,
                truncate=False,
                original_max_position_embeddings=4096,
            ),
            head_dim=64,
            sliding_window=128,
            swiglu_limit=7.0,
            num_local_experts=128,
            num_experts_per_tok=4,
        ),
        windows="layer_types",
        full_every=2,
        activations={"silu": "swiglu_clamped"},
        biases={"attention_bias=True": "all"},
        quantized=("mxfp4",),
        requires={"swiglu_alpha": (1.702,)},
        ignored=("initial_context_length",),
        tensors=attention()
        | PRE_NORMS
        | ends()
        | {
            "mlp/router": Tensor(LAYER + "mlp.router.weight", "R D"),
            "mlp/router_logit_bias": Tensor(LAYER + "mlp.router.bias", "E"),
            "mlp/gate": Tensor(LAYER + "mlp.experts.gate_up_proj", "E D F2"),
            "mlp/up": Tensor(LAYER + "mlp.experts.gate_up_proj", "E D F2", index=1),
            "mlp/down": Tensor(LAYER + "mlp.experts.down_proj", "E F D"),
            "mlp/gate_bias": Tensor(LAYER + "mlp.experts.gate_up_proj_bias", "E F2"),
            "mlp/up_bias": Tensor(
                LAYER + "mlp.experts.gate_up_proj_bias", "E F2", index=1
            ),
            "mlp/down_bias": Tensor(LAYER + "mlp.experts.down_proj_bias", "E D"),
        },
    ),
    "llama4_text": Family(
        architecture="Llama4ForCausalLM",
        fixed={
            "moe.router": "sigmoid",
            "moe.variant.share_of": "input",
            "moe.num_shared_experts": 1,
            "rope.interleaved": True,
            "variant.qk_norm": "rotated",
        },
        keys=KEYS
        | LOCAL_EXPERTS
        | {
            "qk_norm": "use_qk_norm",
            "variant.attention_chunk": "attention_chunk_size",
            "variant.nope_growth": "attn_scale",
            "variant.nope_length": "floor_scale",
        },
        defaults=BASE
        | dict(
            rms_norm_eps=1e-5,
            rope_theta=500_000.0,
            head_dim=128,
            use_qk_norm=True,
            num_local_experts=16,
            num_experts_per_tok=1,
            attention_chunk_size=8192,
            attn_scale=0.1,
            floor_scale=8192,
        ),
        windows="chunks",
        rotated="listed",
        activations=SILU,
        biases=ATTENTION_BIASES,
        requires={
            "attn_temperature_tuning": (True, 4),  # 4 in the first files
            "interleave_moe_layer_step": (1,),
        },
        ignored=(
            *("intermediate_size_mlp", "for_llm_compressor"),
            "no_rope_layer_interval",
        ),
        tensors=attention()
        | PRE_NORMS
        | ends()
        | {
            "mlp/router": Tensor(LAYER + "feed_forward.router.weight", "R D"),
            "mlp/gate": Tensor(LAYER + "feed_forward.experts.gate_up_proj", "E D +F"),
            "mlp/up": Tensor(
                LAYER + "feed_forward.experts.gate_up_proj", "E D +F", after="F"
            ),
            "mlp/down": Tensor(LAYER + "feed_forward.experts.down_proj", "E F D"),
        }
        | {
            f"mlp/shared/{name}": Tensor(
                f"{LAYER}feed_forward.shared_expert.{name}_proj.weight", dims
            )
            for name, dims in (("gate", "F D"), ("up", "F D"), ("down", "D F"))
        },
    ),
}

# SPDX-License-Identifier: Apache-2.0
"""Families of mixtures with shared experts, most of them with dense layers too."""

from collections.abc import Mapping

from jaxllm.hf.table import (
    ATTENTION_BIASES,
    BASE,
    EXPERTS,
    FUSED_EXPERTS,
    GRANITE_BASE,
    GRANITE_KEYS,
    KEYS,
    LAYER,
    LLAMA,
    LOCAL_EXPERTS,
    SILU,
    Family,
    Tensor,
    gate_up,
    mlp,
)

DENSE_LAYERS = mlp(ours="dense/")
SHARED_EXPERTS = mlp(LAYER + "mlp.shared_experts.", ours="mlp/shared/")
CHOICE_BIAS = {
    "mlp/router_bias": Tensor(LAYER + "mlp.gate.e_score_correction_bias", "R")
}
# Scores are sigmoids, experts are chosen from groups, and layers in front are dense.
DEEPSEEK = {
    "moe.router": "sigmoid",
    "moe.variant.choice_bias": True,
    "moe.variant.group_best": 2,
}
DEEPSEEK_KEYS = {
    "moe.num_experts": "n_routed_experts",
    "moe.experts_per_token": "num_experts_per_tok",
    "moe.d_ff_expert": "moe_intermediate_size",
    "moe.num_shared_experts": "n_shared_experts",
    "moe.renormalize": "norm_topk_prob",
    "moe.variant.route_scale": "routed_scaling_factor",
    "moe.variant.groups": "n_group",
    "moe.variant.groups_per_token": "topk_group",
}
DEEPSEEK_TENSORS = LLAMA | EXPERTS | SHARED_EXPERTS | DENSE_LAYERS | CHOICE_BIAS
# What files of DeepSeek's code say beside; transformers has it in its code.
DEEPSEEK_SAYS = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
}

SHARED: Mapping[str, Family] = {
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        fixed={"moe.num_shared_experts": 1, "moe.variant.shared_gate": True},
        keys=KEYS
        | {
            "moe.num_experts": "num_experts",
            "moe.experts_per_token": "num_experts_per_tok",
            "moe.d_ff_expert": "moe_intermediate_size",
            "moe.variant.d_ff_shared": "shared_expert_intermediate_size",
            "moe.renormalize": "norm_topk_prob",
        },
        defaults=BASE
        | dict(
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            norm_topk_prob=False,
        ),
        activations=SILU,
        biases={"qkv_bias=True": "qkv", "qkv_bias=False": "none"},
        # Versions 4 and 5 differ in which layers have a window; no published file has.
        requires={"use_sliding_window": (False,)},
        ignored=("sliding_window", "max_window_layers"),
        sparse="unlisted",
        tensors=LLAMA
        | EXPERTS
        | mlp(LAYER + "mlp.shared_expert.", ours="mlp/shared/")
        | {"mlp/shared_gate": Tensor(LAYER + "mlp.shared_expert_gate.weight", "1 D")}
        | DENSE_LAYERS,
    ),
    "glm4_moe": Family(
        architecture="Glm4MoeForCausalLM",
        fixed=DEEPSEEK,
        keys=KEYS | DEEPSEEK_KEYS | {"qk_norm": "use_qk_norm"},
        defaults=BASE
        | dict(
            rms_norm_eps=1e-5,
            partial_rotary_factor=0.5,
            n_routed_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1408,
            n_shared_experts=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            use_qk_norm=False,
        ),
        activations=SILU,
        biases={"attention_bias=False": "none", "attention_bias=True": "qkv"},
        requires=DEEPSEEK_SAYS,
        ignored=("num_mtp_layers", "num_nextn_predict_layers"),
        sparse="behind",
        tensors=DEEPSEEK_TENSORS,
        skipped=(r"model\.layers\.{L}\..*",),  # behind the last, for further tokens
    ),
    "dots1": Family(
        architecture="Dots1ForCausalLM",
        fixed=DEEPSEEK | {"qk_norm": True},
        keys=KEYS | DEEPSEEK_KEYS,
        defaults=BASE
        | dict(
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            sliding_window=4096,
            max_window_layers=62,
            use_sliding_window=True,
        ),
        windows="upper_layers",
        activations=SILU,
        biases=ATTENTION_BIASES,
        requires=DEEPSEEK_SAYS,
        sparse="behind",
        tensors=DEEPSEEK_TENSORS,
    ),
    "granitemoehybrid": Family(
        architecture="GraniteMoeHybridForCausalLM",
        # Top-k of the logits, then a softmax of those: a softmax renormalised.
        fixed={
            "moe.router": "softmax",
            "moe.renormalize": True,
            "moe.num_shared_experts": 1,
        },
        keys=KEYS
        | GRANITE_KEYS
        | LOCAL_EXPERTS
        | {
            "moe.variant.d_ff_shared": "shared_intermediate_size",
        },
        aliases={"layer_types": "layers_block_type"},
        defaults=GRANITE_BASE
        | dict(
            num_local_experts=8,
            num_experts_per_tok=2,
            shared_intermediate_size=1024,
            layer_types=["mamba"],
        ),
        layer_names={"attention": "full_attention"},
        rotated="named",
        activations=SILU,
        biases=ATTENTION_BIASES,
        # Of Mamba layers, which are refused; their number of heads is checked even so.
        constants={"mamba_n_heads": 1},
        ignored=(
            *("mamba_chunk_size", "mamba_conv_bias", "mamba_d_conv", "mamba_d_head"),
            *("mamba_d_state", "mamba_expand", "mamba_n_groups", "mamba_n_heads"),
            *("mamba_proj_bias", "time_step_limit", "init_method"),
        ),
        requires={"normalization_function": ("rmsnorm",)},
        dense_width="shared_intermediate_size",
        tensors=LLAMA
        | FUSED_EXPERTS
        | gate_up(LAYER + "shared_mlp.", "input_linear", "output_linear", "mlp/shared/")
        | gate_up(LAYER + "shared_mlp.", "input_linear", "output_linear", "dense/"),
    ),
    "ernie4_5_moe": Family(
        architecture="Ernie4_5_MoeForCausalLM",
        fixed={
            "rope.interleaved": True,
            "moe.renormalize": True,
            "moe.variant.choice_bias": True,
        },
        keys=KEYS
        | {
            "moe.num_experts": "moe_num_experts",
            "moe.experts_per_token": "moe_k",
            "moe.d_ff_expert": "moe_intermediate_size",
            "moe.num_shared_experts": "moe_num_shared_experts",
        },
        defaults=BASE
        | dict(
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_theta=500_000.0,
            moe_num_experts=64,
            moe_k=6,
            moe_intermediate_size=1536,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
            moe_layer_end_index=-1,
            moe_layer_interval=1,
        ),
        activations=SILU,
        requires={"use_bias": (False,)},
        # Least sum of shares to divide by: far below any that occurs.
        ignored=("moe_norm_min",),
        sparse="between",
        tensors=LLAMA
        | EXPERTS
        | SHARED_EXPERTS
        | DENSE_LAYERS
        | {
            "mlp/router_bias": Tensor(
                LAYER + "mlp.moe_statics.e_score_correction_bias", "1 R"
            )
        },
        skipped=(r".*mtp.*",),
    ),
}

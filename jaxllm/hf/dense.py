# SPDX-License-Identifier: Apache-2.0
"""Families of dense models with RMSNorm."""

from collections.abc import Mapping

from jaxllm.hf.table import (
    ATTENTION_BIASES,
    BASE,
    BIASES,
    BOTH_NORMS,
    FLAT_NORMS,
    GATE_UP,
    GEMMA,
    GRANITE_BASE,
    GRANITE_KEYS,
    KEYS,
    LAYER,
    LLAMA,
    POST_NORMS,
    ROTARY_BUFFER,
    SILU,
    TANH,
    Family,
    attention,
    ends,
    fused_heads,
    mlp,
    norms,
)

DENSE: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        keys=KEYS,
        defaults=BASE,
        activations=SILU,
        biases=BIASES,
        tensors=LLAMA,
        skipped=(ROTARY_BUFFER,),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        fixed={"bias": "qkv"},
        keys=KEYS,
        defaults=BASE | dict(max_window_layers=28, sliding_window=4096),
        windows="upper_layers",
        activations=SILU,
        tensors=LLAMA,
        skipped=(ROTARY_BUFFER,),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        fixed={"qk_norm": True},
        keys=KEYS,
        defaults=BASE | dict(max_window_layers=28, sliding_window=4096, head_dim=128),
        windows="upper_layers",
        activations=SILU,
        requires={"attention_bias": (False,)},
        tensors=LLAMA,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        keys=KEYS,
        defaults=BASE | dict(sliding_window=4096),
        windows="always",
        activations=SILU,
        tensors=LLAMA,
        skipped=(ROTARY_BUFFER,),
    ),
    "ministral": Family(
        architecture="MinistralForCausalLM",
        keys=KEYS,
        defaults=BASE | dict(sliding_window=4096),
        windows="layer_types",
        activations=SILU,
        tensors=LLAMA,
    ),
    "ministral3": Family(
        architecture="Ministral3ForCausalLM",
        scalings=("default", "yarn"),
        extras=("variant.query_growth",),
        keys=KEYS,
        defaults=BASE | dict(rms_norm_eps=1e-5, head_dim=128, sliding_window=None),
        windows="always",
        activations=SILU,
        tensors=LLAMA,
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        fixed=GEMMA | {"variant.embedding_scale": "sqrt(d_model)"},
        keys=KEYS,
        defaults=BASE | dict(tie_word_embeddings=True, head_dim=256),
        # The old name "gelu" is the tanh form in this family.
        activations=TANH | {"gelu": "geglu"},
        requires={"attention_bias": (False,), "use_bidirectional_attention": (None,)},
        ignored=("hidden_activation",),
        tensors=LLAMA,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        fixed=GEMMA
        | {
            "variant.embedding_scale": "sqrt(d_model)",
            "variant.norm_position": "both",
        },
        keys=KEYS
        | {
            "variant.attention_scale": "query_pre_attn_scalar",
            "attention_softcap": "attn_logit_softcapping",
            "logit_softcap": "final_logit_softcapping",
        },
        defaults=BASE
        | dict(
            tie_word_embeddings=True,
            head_dim=256,
            query_pre_attn_scalar=256,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            sliding_window=4096,
        ),
        windows="layer_types",
        full_every=2,
        activations=TANH,
        activation_key="hidden_activation",
        requires={"attention_bias": (False,), "use_bidirectional_attention": (None,)},
        ignored=("hidden_act",),
        tensors=attention() | mlp() | BOTH_NORMS | ends(),
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        fixed=GEMMA
        | {
            "variant.embedding_scale": "sqrt(d_model)",
            "variant.norm_position": "both",
            "qk_norm": True,
        },
        keys=KEYS
        | {
            "variant.attention_scale": "query_pre_attn_scalar",
            "logit_softcap": "final_logit_softcapping",
        },
        defaults=BASE
        | dict(
            tie_word_embeddings=True,
            head_dim=256,
            query_pre_attn_scalar=256,
            final_logit_softcapping=None,
            sliding_window=4096,
            rope_theta=1_000_000.0,
            rope_local_base_freq=10_000.0,
        ),
        windows="layer_types",
        full_every=6,
        window_theta="rope_local_base_freq",
        activations=TANH,
        activation_key="hidden_activation",
        requires={
            "attention_bias": (False,),
            "use_bidirectional_attention": (None, False),
        },
        # The softcap of attention is not used by this family, even if it is set.
        ignored=("hidden_act", "attn_logit_softcapping", "_sliding_window_pattern"),
        tensors=attention() | mlp() | BOTH_NORMS | ends(),
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        keys=KEYS,
        defaults=BASE
        | dict(rms_norm_eps=1e-5, sliding_window=None, partial_rotary_factor=1.0),
        windows="always",
        scalings=("default", "longrope"),
        activations=SILU,
        tensors=LLAMA
        | fused_heads(LAYER + "self_attn.qkv_proj", "+?H D", "+?H")
        | GATE_UP,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        fixed={
            "variant.norm_position": "post",
            "variant.qk_norm": "flat",
            "qk_norm": True,
        },
        keys=KEYS,
        defaults=BASE | dict(rms_norm_eps=1e-5),
        activations=SILU,
        requires={"attention_bias": (False,)},
        tensors=attention() | mlp() | POST_NORMS | FLAT_NORMS | ends(),
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        fixed={
            "variant.norm_position": "post",
            "variant.qk_norm": "flat",
            "qk_norm": True,
        },
        keys=KEYS,
        defaults=BASE
        | dict(rms_norm_eps=1e-5, sliding_window=4096, rope_theta=500_000.0),
        windows="layer_types",
        full_every=4,
        window_theta="rope_theta",
        activations=SILU,
        requires={"attention_bias": (False,)},
        tensors=attention() | mlp() | POST_NORMS | FLAT_NORMS | ends(),
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        keys=KEYS | GRANITE_KEYS,
        defaults=GRANITE_BASE,
        activations=SILU,
        biases=BIASES,
        tensors=LLAMA,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        keys=KEYS,
        defaults=BASE
        | dict(tie_word_embeddings=True, rope_theta=2_000_000.0, sliding_window=None),
        windows="layer_types",
        rotated="listed",
        activations=SILU,
        biases=BIASES,
        ignored=("no_rope_layer_interval", "max_window_layers"),
        tensors=LLAMA,
    ),
    "seed_oss": Family(
        architecture="SeedOssForCausalLM",
        keys=KEYS,
        defaults=BASE | dict(head_dim=128),
        activations=SILU,
        biases={
            "attention_bias=False attention_out_bias=False mlp_bias=False": "none",
            "attention_bias=True attention_out_bias=False mlp_bias=False": "qkv",
            "attention_bias=True attention_out_bias=True mlp_bias=False": "attention",
            "attention_bias=True attention_out_bias=True mlp_bias=True": "all",
        },
        tensors=LLAMA,
    ),
    "exaone4": Family(
        architecture="Exaone4ForCausalLM",
        fixed={"variant.norm_position": "post", "qk_norm": True},
        keys=KEYS,
        defaults=BASE | dict(rms_norm_eps=1e-5, sliding_window=None),
        windows="layer_types",
        full_every=4,
        rotated="windows",
        activations=SILU,
        tensors=attention() | mlp() | POST_NORMS | ends(),
    ),
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        fixed={"variant.norm_position": "both", "rope.interleaved": True},
        keys=KEYS,
        defaults=BASE | dict(rms_norm_eps=1.5625e-7, partial_rotary_factor=0.5),
        activations=SILU,
        biases={"attention_bias=False": "none", "attention_bias=True": "qkv"},
        tensors=attention()
        | mlp()
        | norms(
            attention_norm="input_layernorm",
            attention_out_norm="post_self_attn_layernorm",
            mlp_norm="post_attention_layernorm",
            mlp_out_norm="post_mlp_layernorm",
        )
        | ends()
        | GATE_UP,
    ),
    "arcee": Family(
        architecture="ArceeForCausalLM",
        keys=KEYS,
        defaults=BASE | dict(rms_norm_eps=1e-5),
        activations={"relu2": "relu2"},
        biases=BIASES,
        tensors=LLAMA,
    ),
    "nanochat": Family(
        architecture="NanoChatForCausalLM",
        fixed={
            "qk_norm": True,
            "rope.reversed": True,
            "variant.embedding_norm": True,
            "variant.norm_scale": False,
            "variant.qk_norm": "rotated",
        },
        keys=KEYS | {"logit_softcap": "final_logit_softcapping"},
        defaults=BASE | dict(final_logit_softcapping=15.0),
        activations={"relu2": "relu2"},
        biases=ATTENTION_BIASES,
        tensors=attention() | mlp(up="fc1", down="fc2") | ends(),
    ),
}

# SPDX-License-Identifier: Apache-2.0
"""Families of models with LayerNorm."""

from collections.abc import Mapping

from jaxllm.hf.table import (
    ATTENTION_BIASES,
    BASE,
    KEYS,
    LAYERNORM_KEYS,
    LLAMA,
    NORMS_BY_HEAD,
    PLAIN_TANH,
    PRE_NORMS,
    SILU,
    Family,
    Tensor,
    attention,
    ends,
    fused_heads,
    mlp,
    norms,
)

LAYERNORM: Mapping[str, Family] = {
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        fixed={"norm": "layernorm"},
        keys=KEYS | {"norm_eps": "norm_epsilon"},
        defaults=BASE
        | dict(tie_word_embeddings=True, norm_epsilon=1e-5, sliding_window=None),
        windows="always",
        activations=PLAIN_TANH,
        biases={"use_bias=True": "all", "use_bias=False": "none"},
        tensors=attention() | mlp(up="c_fc", down="c_proj") | PRE_NORMS | ends(),
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        fixed={"norm": "layernorm", "bias": "all"},
        keys={
            name: key for name, key in LAYERNORM_KEYS.items() if name != "num_kv_heads"
        },
        defaults=BASE
        | dict(layer_norm_eps=1e-5, rotary_pct=0.25, use_parallel_residual=True),
        activations={"gelu": "gelu_exact", **PLAIN_TANH},
        requires={"attention_bias": (True,)},
        tensors={
            **fused_heads(
                "gpt_neox.layers.{n}.attention.query_key_value", "?3H D", "?3H"
            ),
            "attention/out": Tensor(
                "gpt_neox.layers.{n}.attention.dense.weight", "D NH"
            ),
            "attention/out_bias": Tensor(
                "gpt_neox.layers.{n}.attention.dense.bias", "D"
            ),
            "mlp/up": Tensor("gpt_neox.layers.{n}.mlp.dense_h_to_4h.weight", "F D"),
            "mlp/up_bias": Tensor("gpt_neox.layers.{n}.mlp.dense_h_to_4h.bias", "F"),
            "mlp/down": Tensor("gpt_neox.layers.{n}.mlp.dense_4h_to_h.weight", "D F"),
            "mlp/down_bias": Tensor("gpt_neox.layers.{n}.mlp.dense_4h_to_h.bias", "D"),
            **norms(
                "gpt_neox.",
                attention_norm="layers.{n}.input_layernorm",
                mlp_norm="layers.{n}.post_attention_layernorm",
                final_norm="final_layer_norm",
            ),
            "embedding": Tensor("gpt_neox.embed_in.weight", "V D"),
            "output": Tensor("embed_out.weight", "V D"),
        },
        skipped=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        fixed={"norm": "layernorm", "bias": "all"},
        keys={
            "vocab_size": "vocab_size",
            "num_layers": "n_layer",
            "d_model": "n_embd",
            "num_heads": "n_head",
            "norm_eps": "layer_norm_epsilon",
            "d_ff": "n_inner",
            "tie_embeddings": "tie_word_embeddings",
            "variant.positions": "n_positions",
        },
        defaults=dict(
            layer_norm_epsilon=1e-5, tie_word_embeddings=True, n_positions=1024
        ),
        rotated="none",
        activations=PLAIN_TANH | {"gelu": "gelu_exact"},
        activation_key="activation_function",
        requires={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
        },
        ignored=(
            *("n_ctx", "summary_type", "summary_use_proj", "summary_activation"),
            *("summary_proj_to_labels", "summary_first_dropout", "attn_pdrop"),
            *("task_specific_params", "gradient_checkpointing"),
        ),
        tensors={
            **fused_heads("transformer.h.{n}.attn.c_attn", "D +?H", "+?H"),
            "attention/out": Tensor("transformer.h.{n}.attn.c_proj.weight", "NH D"),
            "attention/out_bias": Tensor("transformer.h.{n}.attn.c_proj.bias", "D"),
            "mlp/up": Tensor("transformer.h.{n}.mlp.c_fc.weight", "D F"),
            "mlp/up_bias": Tensor("transformer.h.{n}.mlp.c_fc.bias", "F"),
            "mlp/down": Tensor("transformer.h.{n}.mlp.c_proj.weight", "F D"),
            "mlp/down_bias": Tensor("transformer.h.{n}.mlp.c_proj.bias", "D"),
            **norms(
                "transformer.",
                attention_norm="h.{n}.ln_1",
                mlp_norm="h.{n}.ln_2",
                final_norm="ln_f",
            ),
            "embedding": Tensor("transformer.wte.weight", "V D"),
            "positions": Tensor("transformer.wpe.weight", "V D"),
            "output": Tensor("lm_head.weight", "V D"),
        },
        skipped=(r".*\.attn\.(bias|masked_bias)",),
    ),
    "cohere": Family(
        architecture="CohereForCausalLM",
        fixed={
            "norm": "layernorm",
            "variant.norm_bias": False,
            "variant.parallel": "one_norm",
            "variant.qk_norm": "layernorm",
            "rope.interleaved": True,
        },
        keys=LAYERNORM_KEYS
        | {"variant.logit_scale": "logit_scale", "qk_norm": "use_qk_norm"},
        defaults=BASE
        | dict(
            layer_norm_eps=1e-5,
            tie_word_embeddings=True,
            logit_scale=0.0625,
            rope_theta=500_000.0,
            use_qk_norm=False,
        ),
        activations=SILU,
        biases=ATTENTION_BIASES,
        tensors=LLAMA | NORMS_BY_HEAD,
    ),
    "cohere2": Family(
        architecture="Cohere2ForCausalLM",
        fixed={
            "norm": "layernorm",
            "variant.norm_bias": False,
            "variant.parallel": "one_norm",
            "rope.interleaved": True,
        },
        keys=LAYERNORM_KEYS | {"variant.logit_scale": "logit_scale"},
        defaults=BASE
        | dict(
            layer_norm_eps=1e-5,
            tie_word_embeddings=True,
            logit_scale=0.0625,
            sliding_window=4096,
        ),
        windows="layer_types",
        full_every=4,
        rotated="windows",
        activations=SILU,
        biases=ATTENTION_BIASES,
        ignored=(
            "order_of_interleaved_layers",
            "rotary_pct",
            "position_embedding_type",
        ),
        tensors=LLAMA,
    ),
}

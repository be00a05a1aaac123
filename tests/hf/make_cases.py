# SPDX-License-Identifier: Apache-2.0
"""Makes cases.json and cases.npz: small models and what transformers says of them.

And others, by FILES. In an environment with torch, transformers and numpy:

python tests/hf/make_cases.py [cases_mixtures]
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    AutoConfig,
    AutoModelForCausalLM,
)
from weights import draw

PROMPTS, NEW_TOKENS, LENGTH = (5, 11), 40, 24
SIZES = dict(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# Heads that are not the width divided by their number.
WIDE = dict(SIZES, hidden_size=20, head_dim=6)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16
)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=4.0)
PLAIN = dict(rope_type="default", rope_theta=1e4)
GRANITE = dict(
    embedding_multiplier=3.0,
    attention_multiplier=0.3,
    residual_multiplier=0.4,
    logits_scaling=2.0,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
TIED = dict(tie_word_embeddings=True)
UNTIED = dict(tie_word_embeddings=False)
FOUR = dict(num_hidden_layers=4)
CASES = {
    "llama_plain": dict(WIDE),
    "llama_all_biases": dict(SIZES, **TIED, attention_bias=True, mlp_bias=True),
    "llama_attention_bias": dict(WIDE, attention_bias=True),
    "llama_llama3": dict(WIDE, rope_parameters=LLAMA3, rms_norm_eps=1e-5),
    "llama_linear": dict(WIDE, rope_parameters=LINEAR),
    "llama_yarn": dict(WIDE, rope_parameters=YARN),
    "qwen2": dict(SIZES),
    "qwen2_windows": dict(
        SIZES, **TIED, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": dict(WIDE),
    "qwen3_yarn": dict(
        WIDE, **TIED, rope_parameters=dict(YARN, beta_fast=8.0, beta_slow=0.5)
    ),
    "mistral": dict(WIDE, sliding_window=5),
    "mistral_full": dict(WIDE, **TIED, sliding_window=None),
    "ministral": dict(
        WIDE,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "ministral3": dict(
        WIDE,
        rope_parameters=dict(
            YARN, llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0
        ),
    ),
    "gemma": dict(WIDE),
    "gemma_untied": dict(WIDE, **UNTIED, rope_parameters=dict(PLAIN, rope_theta=5e3)),
    "gemma2": dict(
        WIDE,
        **FOUR,
        sliding_window=5,
        query_pre_attn_scalar=7,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=1.5,
    ),
    "gemma2_untied": dict(WIDE, **UNTIED, sliding_window=6, query_pre_attn_scalar=6),
    "gemma3_text": dict(
        WIDE, sliding_window=5, query_pre_attn_scalar=7, num_hidden_layers=7
    ),
    "gemma3_text_linear": dict(
        WIDE,
        sliding_window=5,
        query_pre_attn_scalar=7,
        num_hidden_layers=6,
        rope_parameters=dict(
            full_attention=dict(LINEAR, rope_theta=1e6), sliding_attention=PLAIN
        ),
    ),
    "phi3": dict(SIZES),
    "phi3_window": dict(
        SIZES,
        **TIED,
        hidden_size=32,
        sliding_window=5,
        rope_parameters=dict(PLAIN, partial_rotary_factor=0.75),
    ),
    "phi3_longrope": dict(
        SIZES,
        hidden_size=32,
        original_max_position_embeddings=16,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=1e4,
            short_factor=[1.0, 1.1, 1.2, 1.5],
            long_factor=[1.0, 2.0, 3.0, 4.0],
        ),
    ),
    "olmo2": dict(SIZES),
    "olmo2_tied": dict(SIZES, **TIED, rope_parameters=dict(PLAIN, rope_theta=5e5)),
    "olmo3": dict(SIZES, **FOUR, sliding_window=5),
    "olmo3_yarn": dict(
        SIZES,
        **FOUR,
        sliding_window=5,
        rope_parameters=dict(
            full_attention=dict(YARN, rope_theta=5e5),
            sliding_attention=dict(PLAIN, rope_theta=5e5),
        ),
    ),
    "granite": dict(SIZES, **GRANITE),
    "granite_bias": dict(SIZES, **GRANITE, **TIED, attention_bias=True),
    "smollm3": dict(SIZES, **FOUR),
    "smollm3_untied": dict(SIZES, **UNTIED, no_rope_layers=[1, 0, 1]),
    "gpt2": dict(vocab_size=37, n_embd=24, n_layer=3, n_head=4, n_positions=64),
    "gpt2_untied": dict(
        vocab_size=37,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
        n_inner=28,
        activation_function="gelu",
        **UNTIED,
    ),
    "gpt_neox": dict(
        SIZES, hidden_size=32, rope_parameters=dict(PLAIN, partial_rotary_factor=0.25)
    ),
    "gpt_neox_serial": dict(
        SIZES,
        **TIED,
        hidden_size=32,
        use_parallel_residual=False,
        rope_parameters=dict(PLAIN, partial_rotary_factor=0.5),
    ),
    "starcoder2": dict(SIZES, sliding_window=5),
    "starcoder2_untied": dict(SIZES, **UNTIED, sliding_window=None),
    "cohere": dict(SIZES),
    "cohere_qk_norm": dict(SIZES, use_qk_norm=True, logit_scale=0.3),
    "cohere2": dict(SIZES, **FOUR, sliding_window=5, head_dim=6),
    "cohere2_untied": dict(SIZES, **FOUR, **UNTIED, sliding_window=7, logit_scale=0.5),
    "exaone4": dict(WIDE, **FOUR, sliding_window=5, sliding_window_pattern=4),
    "glm4": dict(WIDE, head_dim=8, attention_bias=True),
    "glm4_tied": dict(WIDE, **TIED, head_dim=8),
    "seed_oss": dict(WIDE, attention_bias=True),
    "seed_oss_out": dict(WIDE, **TIED, attention_bias=True, attention_out_bias=True),
    "arcee": dict(SIZES),
    "arcee_biases": dict(SIZES, **TIED, mlp_bias=True, attention_bias=True),
    "mixtral": dict(SIZES, **LOCAL_EXPERTS),
    "mixtral_window": dict(
        SIZES, **TIED, num_local_experts=5, num_experts_per_tok=3, sliding_window=5
    ),
    "qwen3_moe": dict(WIDE, **EXPERTS, moe_intermediate_size=12, norm_topk_prob=True),
    "qwen3_moe_plain": dict(
        WIDE, **EXPERTS, **TIED, moe_intermediate_size=12, norm_topk_prob=False
    ),
    "olmoe": dict(SIZES, **EXPERTS),
    "olmoe_renormalized": dict(SIZES, **EXPERTS, **TIED, norm_topk_prob=True),
    "granitemoe": dict(SIZES, **LOCAL_EXPERTS, **GRANITE),
    "granitemoe_tied": dict(SIZES, **LOCAL_EXPERTS, **GRANITE, **TIED),
}
# Of their own routing, activations or masks, and further ones of the above.
OTHERS = {
    "exaone4_tied": dict(
        WIDE, **TIED, **FOUR, sliding_window=7, sliding_window_pattern=2
    ),
    "ministral_tied": dict(WIDE, **TIED, rope_parameters=LINEAR, sliding_window=6),
    "ministral3_tied": dict(
        SIZES,
        **TIED,
        rms_norm_eps=1e-6,
        rope_parameters=dict(
            YARN, factor=2.0, llama_4_scaling_beta=0.3, mscale=1.0, mscale_all_dim=1.0
        ),
    ),
    # The limit is low enough to act on these small weights.
    "gpt_oss": dict(
        WIDE | FOUR,
        **LOCAL_EXPERTS,
        sliding_window=5,
        swiglu_limit=0.5,
        rope_parameters=dict(YARN, truncate=False),
    ),
    "gpt_oss_tied": dict(
        WIDE,
        **TIED,
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=7,
        swiglu_limit=0.8,
        rope_parameters=dict(PLAIN, rope_theta=1.5e5),
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "nanochat": dict(WIDE, final_logit_softcapping=1.5),
    "nanochat_tied": dict(
        SIZES,
        **TIED,
        attention_bias=True,
        final_logit_softcapping=None,
        rope_parameters=dict(PLAIN, rope_theta=5e3),
    ),
    # Rows of 24 tokens have several chunks, and queries grow in them.
    "llama4_text": dict(
        WIDE | FOUR,
        **LOCAL_EXPERTS,
        attention_chunk_size=7,
        floor_scale=5,
        attn_scale=0.7,
        rope_parameters=dict(LLAMA3, rope_theta=5e5),
    ),
    "llama4_text_tied": dict(
        WIDE,
        **TIED,
        num_local_experts=4,
        num_experts_per_tok=1,
        use_qk_norm=False,
        attention_bias=True,
        attention_chunk_size=5,
        no_rope_layers=[1, 0, 1],
        floor_scale=3,
    ),
}
HYBRID = dict(
    shared_intermediate_size=20,
    mamba_n_heads=4,
    layer_types=["full_attention"] * 3,
)
QWEN2_MOE = dict(EXPERTS, moe_intermediate_size=12, shared_expert_intermediate_size=20)
DEEPSEEK = dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=12)
ERNIE = dict(FOUR, moe_num_experts=4, moe_k=2, moe_intermediate_size=12)
MIXTURES = {
    "qwen2_moe": dict(SIZES, **QWEN2_MOE),
    "qwen2_moe_interval": dict(
        SIZES,
        **QWEN2_MOE,
        **TIED,
        **FOUR,
        norm_topk_prob=True,
        qkv_bias=False,
        decoder_sparse_step=2,
    ),
    "qwen3_moe_first_dense": dict(
        WIDE, **EXPERTS, moe_intermediate_size=12, mlp_only_layers=[0]
    ),
    "qwen3_moe_listed": dict(
        WIDE,
        **EXPERTS,
        **TIED,
        num_hidden_layers=5,
        moe_intermediate_size=12,
        norm_topk_prob=True,
        mlp_only_layers=[0, 3],
    ),
    "glm4_moe": dict(
        SIZES,
        **DEEPSEEK,
        head_dim=8,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        routed_scaling_factor=1.5,
        first_k_dense_replace=1,
        attention_bias=True,
    ),
    "glm4_moe_tied": dict(
        SIZES,
        **DEEPSEEK,
        **TIED,
        head_dim=8,
        n_shared_experts=2,
        norm_topk_prob=False,
        first_k_dense_replace=2,
        use_qk_norm=True,
        rope_parameters=dict(PLAIN, rope_theta=5e3, partial_rotary_factor=0.25),
    ),
    "dots1": dict(
        WIDE,
        **DEEPSEEK,
        n_group=2,
        topk_group=1,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        sliding_window=5,
        max_window_layers=1,
    ),
    "dots1_tied": dict(
        WIDE, **DEEPSEEK, **TIED, n_shared_experts=1, attention_bias=True
    ),
    "minimax_m2": dict(SIZES, **LOCAL_EXPERTS, head_dim=8, rotary_dim=4),
    "minimax_m2_tied": dict(WIDE, **LOCAL_EXPERTS, **TIED),
    "granitemoehybrid": dict(
        SIZES, **LOCAL_EXPERTS, **GRANITE, **HYBRID, position_embedding_type="rope"
    ),
    "granitemoehybrid_dense": dict(
        SIZES, **GRANITE, **HYBRID, **TIED, num_local_experts=0, attention_bias=True
    ),
    "ernie4_5_moe": dict(SIZES, **ERNIE, moe_num_shared_experts=1),
    "ernie4_5_moe_interval": dict(
        WIDE,
        **ERNIE,
        **UNTIED,
        moe_num_shared_experts=2,
        moe_layer_start_index=0,
        moe_layer_interval=2,
    ),
}
# By the name of the files, so that new cases leave the bytes of others alone.
FILES = {"cases": CASES, "cases_others": OTHERS, "cases_mixtures": MIXTURES}
TYPES = sorted(
    "llama qwen2 qwen3 qwen3_moe mistral ministral ministral3 gemma gemma2 gemma3_text "
    "phi3 olmo2 olmo3 olmoe granite granitemoe smollm3 gpt2 gpt_neox starcoder2 cohere "
    "cohere2 exaone4 glm4 seed_oss arcee mixtral gpt_oss nanochat qwen2_moe glm4_moe "
    "dots1 minimax_m2 granitemoehybrid ernie4_5_moe llama4_text".split(),
    key=len,
    reverse=True,
)


def make(case: str, settings: dict, folder: Path) -> tuple[dict, dict]:
    """Returns what the json and the npz file have of a case."""
    settings = dict(settings)
    if "num_key_value_heads" in settings and case.startswith("gpt_neox"):
        del settings["num_key_value_heads"]
    kind = next(kind for kind in TYPES if case.startswith(kind))
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config._experts_implementation = "eager"
    model.float().save_pretrained(folder)
    # Weights by the names in the file: those in memory are of this version only.
    path = folder / "model.safetensors"
    shapes = {k: list(v.shape) for k, v in safetensors.torch.load_file(path).items()}
    drawn = {k: torch.from_numpy(draw(case, k, tuple(v))) for k, v in shapes.items()}
    safetensors.torch.save_file(drawn, path, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model.config._experts_implementation = "eager"
    model = model.float().eval()
    ids = np.random.default_rng(0).integers(3, 37, (2, LENGTH))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.float().numpy()
        greedy = [
            _continue(model, row[:size]) for row, size in zip(ids, PROMPTS, strict=True)
        ]
    content = json.loads((folder / "config.json").read_text())
    return (
        {"config": content, "shapes": shapes},
        {"ids": ids.astype(np.int32), "logits": logits, "greedy": np.stack(greedy)},
    )


def _continue(model, prompt: np.ndarray) -> np.ndarray:
    """Returns the likeliest tokens, as far as they are far ahead of the second; -1."""
    ids, made = torch.from_numpy(prompt)[None], []
    for _ in range(NEW_TOKENS):
        best = model(ids).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < 1e-3:
            break
        made.append(int(best.indices[0]))
        ids = torch.cat([ids, best.indices[None, :1]], 1)
    return np.array(made + [-1] * (NEW_TOKENS - len(made)), np.int32)


def main() -> None:
    for name in sys.argv[1:] or FILES:
        write(name, FILES[name])


def write(name: str, cases: dict[str, dict]) -> None:
    """Writes two files of cases."""
    facts, arrays = {"transformers": transformers.__version__, "cases": {}}, {}
    for case, settings in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            facts["cases"][case], found = make(case, settings, Path(folder))
        arrays |= {f"{case}/{name}": value for name, value in found.items()}
        largest = np.abs(found["logits"]).max()
        print(case, f"{largest:.2f}", (found["greedy"] >= 0).sum(1), flush=True)
    folder = Path(__file__).parent
    text = json.dumps(facts, separators=(",", ":")) + "\n"
    (folder / f"{name}.json").write_text(text)
    np.savez_compressed(folder / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The words of a family's table, and the parts that tables share.

Source: transformers 5.24.0 and 4.57.6, their configurations, modelling code and files.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxllm.hf.layers import Sparse

Windows = Literal["never", "always", "layer_types", "upper_layers", "chunks"]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a parameter is in the files.

    Attributes:
      name: with {n} for the number of the layer and {e} for that of the expert.
      dims: the letters of each dimension, such as "NH D" for heads times head width,
        then model width. A digit is a dimension of several parameters, one of which is
        this: "N3H D" has query, key and value of a head together. A dimension with + is
        those of several parameters, one behind the other.
      after: letters of what is before it in the dimension with +: "NH KH".
      index: of this parameter along the digit. Behind the letters it is the fastest:
        "F2" has gate and up in turn.
    """

    name: str
    dims: str
    after: str = ""
    index: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How a family writes settings and parameters.

    Attributes:
      architecture: its class in transformers.
      fixed: settings of ModelConfig that all its models have.
      keys: key of config.json by setting, for values that are written as they are.
      aliases: other names that versions of transformers have for keys: read, and
        written beside them.
      defaults: of keys that may be absent: those of its class in transformers.
      windows: the rule for layers with a window, or for those that see a chunk.
      full_every: without a list of layers, each so many-th has no window; 0: none.
      layer_names: kinds of layers by their names in version 4, which are written.
      rotated: layers with RoPE: all, those with a window, or as `no_rope_layers` says;
        named: all or none, as `position_embedding_type` says.
      scalings: types of RoPE that its code has.
      extras: settings of ModelConfig that its RoPE has beside them.
      window_theta: the key with RoPE's theta of layers with a window, which are never
        scaled; "": they have what others have.
      activations: `mlp` by the activation's name.
      activation_key: the key with that name.
      biases: `bias` by the values of keys.
      quantized: values of quant_method whose tensors can be read.
      requires: keys that must have one of these values; others would change results.
      constants: keys that change no result, and without which its class may refuse.
      ignored: keys that change no result, beside those of all families.
      sparse: the rule for layers with experts.
      dense_width: the key with the width of the MLP where a model has no experts; "":
        it has some.
      tensors: where each parameter is, by its path without the number of the block.
        "dense/up" is "mlp/up" of a layer without experts, where it is apart.
      skipped: patterns of tensors that are no parameters; {L} is the number of layers.
    """

    architecture: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windows: Windows = "never"
    full_every: int = 0
    layer_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rotated: Literal["all", "windows", "listed", "named", "none"] = "all"
    scalings: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    extras: tuple[str, ...] = ()
    window_theta: str = ""
    activations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    activation_key: str = "hidden_act"
    biases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quantized: tuple[str, ...] = ("fp8",)
    requires: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    sparse: Sparse = "all"
    dense_width: str = ""
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    skipped: tuple[str, ...] = ()


# Change no result: training only, or of the generation, or of the file's history.
IGNORED = frozenset(
    """
    _name_or_path architectures attention_dropout attn_implementation auto_map
    bos_token_id cache_implementation chunk_size_feed_forward dtype embd_pdrop
    eos_token_id hidden_dropout hidden_dropout_prob id2label initializer_range
    is_decoder is_encoder_decoder label2id max_position_embeddings mlp_dropout
    model_type output_attentions output_hidden_states output_router_logits
    pad_token_id pretraining_tp problem_type resid_pdrop residual_dropout return_dict
    router_aux_loss_coef router_jitter_noise sep_token_id tokenizer_class torch_dtype
    torchscript transformers_version use_cache embedding_dropout tie_encoder_decoder
    """.split()
)
DROPOUTS = tuple(
    "attention_dropout attn_pdrop embd_pdrop embedding_dropout hidden_dropout "
    "hidden_dropout_prob mlp_dropout resid_pdrop residual_dropout "
    "classifier_dropout".split()
)

LAYER = "model.layers.{n}."
KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
LAYERNORM_KEYS = KEYS | {"norm_eps": "layer_norm_eps"}
SILU = {"silu": "swiglu", "swish": "swiglu"}
TANH = {"gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
PLAIN_TANH = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu"}


def attention(prefix: str = LAYER + "self_attn.", out: str = "o_proj") -> dict:
    """Returns the projections of attention, their biases, norms of heads, sinks."""
    return {
        "attention/query": Tensor(prefix + "q_proj.weight", "NH D"),
        "attention/key": Tensor(prefix + "k_proj.weight", "KH D"),
        "attention/value": Tensor(prefix + "v_proj.weight", "KH D"),
        "attention/out": Tensor(prefix + out + ".weight", "D NH"),
        "attention/query_bias": Tensor(prefix + "q_proj.bias", "NH"),
        "attention/key_bias": Tensor(prefix + "k_proj.bias", "KH"),
        "attention/value_bias": Tensor(prefix + "v_proj.bias", "KH"),
        "attention/out_bias": Tensor(prefix + out + ".bias", "D"),
        "attention/query_norm/scale": Tensor(prefix + "q_norm.weight", "H"),
        "attention/key_norm/scale": Tensor(prefix + "k_norm.weight", "H"),
        "attention/sinks": Tensor(prefix + "sinks", "N"),
    }


def mlp(
    prefix: str = LAYER + "mlp.",
    up: str = "up_proj",
    down: str = "down_proj",
    ours: str = "mlp/",
) -> dict:
    """Returns an MLP that may have a gate and biases."""
    return {
        f"{ours}up": Tensor(f"{prefix}{up}.weight", "F D"),
        f"{ours}gate": Tensor(f"{prefix}gate_proj.weight", "F D"),
        f"{ours}down": Tensor(f"{prefix}{down}.weight", "D F"),
        f"{ours}up_bias": Tensor(f"{prefix}{up}.bias", "F"),
        f"{ours}gate_bias": Tensor(f"{prefix}gate_proj.bias", "F"),
        f"{ours}down_bias": Tensor(f"{prefix}{down}.bias", "D"),
    }


def norms(prefix: str = LAYER, **names: str) -> dict:
    """Returns norms: our name -> theirs behind a prefix."""
    return {
        f"{ours}/{kind}": Tensor(f"{prefix}{theirs}.{suffix}", "D")
        for ours, theirs in names.items()
        for kind, suffix in (("scale", "weight"), ("bias", "bias"))
    }


def fused_heads(name: str, weight: str, bias: str) -> dict:
    """Returns query, key and value in one tensor.

    Args:
      name: of the tensor, without its end.
      weight: its dims, such as "+?H D", with ? for the letter of the heads.
      bias: those of the bias.
    """
    parts = (("query", "N", ""), ("key", "K", "NH"), ("value", "K", "NH KH"))
    found = {}
    for index, (part, letter, after) in enumerate(parts):
        for kind, suffix, dims in (("", "weight", weight), ("_bias", "bias", bias)):
            found[f"attention/{part}{kind}"] = Tensor(
                f"{name}.{suffix}",
                dims.replace("?", letter),
                after=after if "+" in dims else "",
                index=index if "3" in dims else 0,
            )
    return found


def ends(norm: str = "model.norm") -> dict:
    """Returns embedding, output and final norm."""
    return {
        "embedding": Tensor("model.embed_tokens.weight", "V D"),
        "output": Tensor("lm_head.weight", "V D"),
        "final_norm/scale": Tensor(f"{norm}.weight", "D"),
        "final_norm/bias": Tensor(f"{norm}.bias", "D"),
    }


FLAT_NORMS = {
    "attention/query_norm/scale": Tensor(LAYER + "self_attn.q_norm.weight", "NH"),
    "attention/key_norm/scale": Tensor(LAYER + "self_attn.k_norm.weight", "KH"),
}
NORMS_BY_HEAD = {
    "attention/query_norm/scale": Tensor(LAYER + "self_attn.q_norm.weight", "N H"),
    "attention/key_norm/scale": Tensor(LAYER + "self_attn.k_norm.weight", "K H"),
}
PRE_NORMS = norms(
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
)
POST_NORMS = norms(
    attention_out_norm="post_attention_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
BOTH_NORMS = norms(
    attention_norm="input_layernorm",
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
LLAMA = attention() | mlp() | PRE_NORMS | ends()
ROTARY_BUFFER = r".*rotary_emb\.inv_freq"


def experts(router: str, each: str, gate: str, up: str, down: str) -> dict:
    """Returns a router and experts with a tensor each."""
    return {
        "mlp/router": Tensor(LAYER + router, "R D"),
        "mlp/gate": Tensor(f"{LAYER}{each}{gate}.weight", "F D"),
        "mlp/up": Tensor(f"{LAYER}{each}{up}.weight", "F D"),
        "mlp/down": Tensor(f"{LAYER}{each}{down}.weight", "D F"),
    }


EXPERTS = experts(
    "mlp.gate.weight", "mlp.experts.{e}.", "gate_proj", "up_proj", "down_proj"
)
FUSED_EXPERTS = {
    "mlp/router": Tensor(LAYER + "block_sparse_moe.router.layer.weight", "R D"),
    "mlp/gate": Tensor(LAYER + "block_sparse_moe.input_linear.weight", "E +F D"),
    "mlp/up": Tensor(
        LAYER + "block_sparse_moe.input_linear.weight", "E +F D", after="F"
    ),
    "mlp/down": Tensor(LAYER + "block_sparse_moe.output_linear.weight", "E D F"),
}


def gate_up(prefix: str, both: str, down: str, ours: str) -> dict:
    """Returns an MLP with gate and up in one tensor."""
    return {
        f"{ours}gate": Tensor(f"{prefix}{both}.weight", "+F D"),
        f"{ours}up": Tensor(f"{prefix}{both}.weight", "+F D", after="F"),
        f"{ours}down": Tensor(f"{prefix}{down}.weight", "D F"),
    }


GATE_UP = gate_up(LAYER + "mlp.", "gate_up_proj", "down_proj", "mlp/")
BASE = dict(rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10_000.0)
GEMMA = {"variant.norm_offset": True}
GRANITE_KEYS = {
    "variant.embedding_scale": "embedding_multiplier",
    "variant.attention_scale": "attention_multiplier",
    "variant.residual_scale": "residual_multiplier",
    "variant.logit_scale": "1/logits_scaling",
}
GRANITE_BASE = BASE | dict(
    embedding_multiplier=1.0,
    attention_multiplier=1.0,
    residual_multiplier=1.0,
    logits_scaling=1.0,
)
# Of families whose key for the number of experts is that of Mixtral.
LOCAL_EXPERTS = {
    "moe.num_experts": "num_local_experts",
    "moe.experts_per_token": "num_experts_per_tok",
}
# `bias` by the keys of the families that are written as Llama is.
BIASES = {
    "attention_bias=False mlp_bias=False": "none",
    "attention_bias=True mlp_bias=False": "attention",
    "attention_bias=True mlp_bias=True": "all",
}
ATTENTION_BIASES = {
    "attention_bias=False": "none",
    "attention_bias=True": "attention",
}

# SPDX-License-Identifier: Apache-2.0
"""What a model costs: parameters, FLOPs a token, and how much of a GPU they use."""

import collections
from collections.abc import Mapping

from jaxllm.config import ModelConfig
from jaxllm.config.model import PLAIN_MLPS, Layer

# Dense bfloat16 matmuls with float32 accumulation, FLOP/s of one GPU, by the words of
# its name; the first entry with all its words in the name counts. From NVIDIA's data
# sheets, whose headline figures are twice as high: those assume 2:4 sparsity.
BFLOAT16_PEAKS: Mapping[str, float] = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H800 PCIe": 756e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
# With one of these words, a GPU is only a part or a slower variant of its namesake.
VARIANTS = {"MIG", "Laptop", "D", "Max"}


def num_parameters(model: ModelConfig) -> int:
    """Returns the number of values of all parameters, exactly."""
    tables = model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    variant = model.variant
    tables += variant.positions * model.d_model
    norm, num_norms = _norm(model), 1 + variant.embedding_norm
    sparse = model.num_sparse_layers
    layers = sparse * _layer(model, sparse=True)
    layers += (model.num_layers - sparse) * _layer(model, sparse=False)
    return tables + layers + num_norms * norm


def _layer(model: ModelConfig, *, sparse: bool) -> int:
    variant, moe = model.variant, model.moe
    heads = model.num_heads * model.head_dim
    kv_heads = model.num_kv_heads * model.head_dim
    layer = _matrices(model, moe.num_experts if sparse else 0)
    layer += _num_norms(model) * _norm(model)
    if sparse and moe.has_choice_bias:
        layer += moe.num_experts
    if model.qk_norm and variant.qk_norm != "rotated":
        flat = variant.qk_norm in ("flat", "layernorm")
        layer += heads + kv_heads if flat else 2 * model.head_dim
    if variant.attention_sinks:
        layer += model.num_heads
    if model.bias != "none":
        layer += heads + 2 * kv_heads
    if model.bias in ("attention", "all"):
        layer += model.d_model
    if model.bias == "all":
        layer += _mlp_biases(model, sparse=sparse)
    return layer


def _mlp_biases(model: ModelConfig, *, sparse: bool) -> int:
    """Returns the biases of an MLP, or of a router, its experts and shared ones."""
    moe, inputs, d = model.moe, _mlp_inputs(model), model.d_model
    if not sparse:
        return d + inputs * model.d_ff
    width = moe.num_shared_experts * model.d_ff_shared
    shared = moe.num_shared_experts and d + inputs * width
    return moe.num_experts * (1 + _expert_biases(model)) + shared


def _expert_biases(model: ModelConfig) -> int:
    has_biases = model.bias == "all"
    return has_biases * (model.d_model + _mlp_inputs(model) * model.d_ff_expert)


def _num_norms(model: ModelConfig) -> int:
    one = model.variant.parallel == "one_norm"
    return {"pre": 1 if one else 2, "post": 2, "both": 4}[model.variant.norm_position]


def _norm(model: ModelConfig) -> int:
    has_bias = model.norm == "layernorm" and model.variant.norm_bias
    return model.d_model * (model.variant.norm_scale + has_bias)


def num_active_parameters(model: ModelConfig) -> int:
    """Returns the same without the experts that a token is not sent to."""
    moe = model.moe
    idle = moe.num_experts - moe.experts_per_token if moe.num_experts else 0
    idle *= model.num_sparse_layers
    each = _mlp(model, model.d_ff_expert) + _expert_biases(model)
    return num_parameters(model) - idle * each


def num_matmul_parameters(model: ModelConfig) -> int:
    """Returns the number of values that each token is multiplied with.

    The output projection counts, tied or not; the embedding is a lookup and does not.
    Of the experts, those that a token is sent to.
    """
    output = model.vocab_size * model.d_model
    sparse = model.num_sparse_layers
    layers = sparse * _matrices(model, model.moe.experts_per_token)
    layers += (model.num_layers - sparse) * _matrices(model, 0)
    return layers + output


def flops_per_token(
    model: ModelConfig, sequence_length: int, *, causal: bool = True
) -> float:
    """Returns the floating-point operations of forward and backward, for each token.

    Only matmuls count, a multiplication and an addition each: 6 a matmul parameter, and
    12 * N * H a pair of query and key. Rematerialisation is not counted: it is not
    useful work. The same convention as PaLM's (arXiv:2204.02311, appendix B), except
    that pairs which the mask forbids do not count here.

    Args:
      model: the model.
      sequence_length: tokens a row; documents within a row are taken as one.
      causal: false counts all pairs of a row, as attention that computes forbidden
        pairs and masks them does.
    """
    flops = 6.0 * num_matmul_parameters(model)
    layers = map(model.layer, range(model.num_layers))
    for layer, number in collections.Counter(layers).items():
        keys = _keys(model, layer, sequence_length) if causal else sequence_length
        flops += number * 12 * model.num_heads * model.head_dim * keys
    return flops


def _keys(model: ModelConfig, layer: Layer, sequence_length: int) -> float:
    """Returns how many keys a query of a layer sees on average."""
    chunk = model.variant.attention_chunk
    if not chunk or not layer.rotates:
        return mean_keys(sequence_length, layer.window)
    whole, rest = divmod(sequence_length, chunk)
    pairs = whole * chunk * mean_keys(chunk) + rest * mean_keys(rest or 1)
    return pairs / sequence_length


def mean_keys(sequence_length: int, window: int = 0) -> float:
    """Returns how many keys a query sees under the causal mask, on average over a row.

    Args:
      sequence_length: tokens a row.
      window: keys that a query sees at most, itself included; 0 is all of them.
    """
    window = min(window or sequence_length, sequence_length)
    # The first `window` queries see 1, 2, ... keys, the others `window` each.
    pairs = window * (window + 1) / 2 + (sequence_length - window) * window
    return pairs / sequence_length


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the dense matmul FLOP/s of a GPU; None if it is not in the table.

    Args:
      device_kind: `jax.Device.device_kind`, such as "NVIDIA H100 80GB HBM3".
      dtype: "bfloat16", or "float32", which JAX multiplies as TF32 by default.
    """
    words = set(device_kind.replace("-", " ").split())
    if words & VARIANTS:
        return None
    for name, peak in BFLOAT16_PEAKS.items():
        if set(name.split()) <= words:
            return peak if dtype == "bfloat16" else peak / 2
    return None


def mfu(
    model: ModelConfig,
    sequence_length: int,
    tokens_per_s: float,
    device_kind: str,
    num_devices: int,
) -> float | None:
    """Returns the model FLOPs utilisation, from 0 to 1; None without a known peak.

    Args:
      model: the model; its dtype picks the peak.
      sequence_length: tokens a row.
      tokens_per_s: of all devices together.
      device_kind: see `peak_flops`.
      num_devices: how many of them.
    """
    peak = peak_flops(device_kind, model.dtype)
    if peak is None:
        return None
    return flops_per_token(model, sequence_length) * tokens_per_s / (peak * num_devices)


def _matrices(model: ModelConfig, num_experts: int) -> int:
    """Returns those of a layer with so many experts; 0: a dense one."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads  # query, out; key, value
    attention = model.d_model * model.head_dim * heads
    if not num_experts:
        return attention + _mlp(model, model.d_ff)
    router = model.d_model * model.moe.num_experts
    experts = num_experts * _mlp(model, model.d_ff_expert)
    shared = model.moe.num_shared_experts * _mlp(model, model.d_ff_shared)
    shared += model.d_model * model.moe.variant.shared_gate
    return attention + router + experts + shared


def _mlp(model: ModelConfig, width: int) -> int:
    return (_mlp_inputs(model) + 1) * model.d_model * width


def _mlp_inputs(model: ModelConfig) -> int:
    return 1 if model.mlp in PLAIN_MLPS else 2  # up, or gate and up

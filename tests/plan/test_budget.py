# SPDX-License-Identifier: Apache-2.0
"""Parameters, FLOPs and MFU of a model, against arithmetic done another way."""

import math
from dataclasses import replace

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config import (
    KernelsConfig,
    MoEConfig,
    RopeConfig,
    VariantConfig,
    presets,
)
from jaxllm.models import Model
from jaxllm.plan.budget import (
    BFLOAT16_PEAKS,
    flops_per_token,
    mean_keys,
    mfu,
    num_active_parameters,
    num_matmul_parameters,
    num_parameters,
    peak_flops,
)

TINY = presets.tiny_1m()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"bias": "qkv", "num_kv_heads": 2},
        {"bias": "all"},
        {"bias": "all", "mlp": "gelu", "norm": "layernorm"},
        {"qk_norm": True, "mlp": "geglu"},
        {"windows": (0, 8), "norm": "layernorm", "qk_norm": True},
        {"scan_layers": False},
        {"moe": MoEConfig(num_experts=8, experts_per_token=2)},
        {
            "mlp": "gelu",
            "moe": MoEConfig(
                num_experts=3, d_ff_expert=8, num_shared_experts=2, balance="bias"
            ),
        },
        {
            "bias": "all",
            "moe": MoEConfig(num_experts=3, d_ff_expert=8, num_shared_experts=2),
        },
    ],
)
def test_the_formula_counts_the_parameters_of_the_model(changes):
    config = replace(TINY, **changes)
    shapes = jax.tree.leaves(Model(config, KernelsConfig()).abstract)
    assert num_parameters(config) == sum(math.prod(leaf.shape) for leaf in shapes)


def test_matmul_parameters_leave_out_only_the_lookup_and_the_vectors():
    vectors = (2 * TINY.num_layers + 1) * TINY.d_model
    table = TINY.vocab_size * TINY.d_model
    assert num_matmul_parameters(TINY) == num_parameters(TINY) - vectors - table
    tied = replace(TINY, tie_embeddings=True)
    assert num_matmul_parameters(tied) == num_parameters(tied) - vectors


def test_a_chunk_has_the_pairs_of_a_row_of_its_length():
    variant = VariantConfig(attention_chunk=7)
    rope = RopeConfig(layers=(True, False))
    chunked = replace(TINY, num_layers=2, rope=rope, variant=variant)
    whole = flops_per_token(replace(chunked, variant=VariantConfig()), 24)
    pairs = [sum(q // 7 == k // 7 and k <= q for k in range(24)) for q in range(24)]
    per_key = 12 * TINY.num_heads * TINY.head_dim
    missing = per_key * (mean_keys(24) - sum(pairs) / 24)
    assert flops_per_token(chunked, 24) == pytest.approx(whole - missing, rel=1e-12)


def test_a_token_pays_for_its_own_experts_and_the_router():
    moe = MoEConfig(num_experts=8, experts_per_token=2, d_ff_expert=TINY.d_ff // 2)
    routers = TINY.num_layers * TINY.d_model * moe.num_experts
    mixture = replace(TINY, moe=moe)
    assert num_active_parameters(mixture) == num_parameters(TINY) + routers
    assert num_matmul_parameters(mixture) == num_matmul_parameters(TINY) + routers
    assert flops_per_token(mixture, 64) == flops_per_token(TINY, 64) + 6 * routers


@given(st.integers(1, 60), st.integers(0, 70))
def test_mean_keys_is_the_mean_over_the_mask(length, window):
    keys = [min(t + 1, window or length) for t in range(length)]
    assert mean_keys(length, window) == pytest.approx(sum(keys) / length)


def test_flops_without_attention_are_six_a_matmul_parameter():
    one = flops_per_token(TINY, 1) - 12 * 4 * TINY.num_heads * TINY.head_dim
    assert one == 6 * num_matmul_parameters(TINY)


def test_causal_attention_is_half_of_all_pairs_and_the_diagonal():
    rest = 6 * num_matmul_parameters(TINY)
    causal = flops_per_token(TINY, 64) - rest
    dense = flops_per_token(TINY, 64, causal=False) - rest
    assert dense == 12 * TINY.num_layers * TINY.d_model * 64
    assert causal / dense == pytest.approx((64 + 1) / 2 / 64)


def test_windows_cost_what_their_layers_see():
    local, full = replace(TINY, windows=(8,)), TINY
    mixed = replace(TINY, windows=(8, 0))
    assert flops_per_token(local, 64) < flops_per_token(full, 64)
    assert flops_per_token(mixed, 64) == pytest.approx(
        (flops_per_token(local, 64) + flops_per_token(full, 64)) / 2
    )


def test_flops_of_llama_8b_are_those_that_others_report():
    # 6 * (8.03e9 - the lookup's 0.525e9) + 12 * 32 * 4096 * 8193 / 2
    assert flops_per_token(presets.llama_8b(), 8192) == pytest.approx(51.47e9, rel=1e-3)


@pytest.mark.parametrize(
    ("device_kind", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
    ],
)
def test_the_peak_of_a_gpu_is_its_data_sheets_dense_figure(device_kind, tera):
    assert peak_flops(device_kind, "bfloat16") == tera * 1e12
    assert peak_flops(device_kind, "float32") == tera * 1e12 / 2


@pytest.mark.parametrize(
    "device_kind",
    [
        "cpu",
        "",
        "TPU v5p",
        "NVIDIA RTX A4000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA V100-SXM2-16GB",
    ],
)
def test_an_unknown_device_has_no_peak_and_no_mfu(device_kind):
    assert peak_flops(device_kind, "bfloat16") is None
    assert mfu(TINY, 64, 1e3, device_kind, 1) is None


@pytest.mark.parametrize("name", BFLOAT16_PEAKS)
def test_no_entry_of_the_table_hides_another(name):
    assert peak_flops(f"NVIDIA {name}", "bfloat16") == BFLOAT16_PEAKS[name]


def test_mfu_is_the_share_of_all_devices_peaks():
    tokens_per_s = 8 * 989.4e12 / flops_per_token(TINY, 64)
    assert mfu(TINY, 64, tokens_per_s, "NVIDIA H200", 8) == pytest.approx(1.0)
    assert mfu(TINY, 64, tokens_per_s / 2, "NVIDIA H200", 8) == pytest.approx(0.5)
    half_as_fast = replace(TINY, dtype="float32")
    assert mfu(half_as_fast, 64, tokens_per_s, "NVIDIA H200", 8) == pytest.approx(2.0)

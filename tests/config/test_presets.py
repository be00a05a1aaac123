# SPDX-License-Identifier: Apache-2.0
"""Model sizes: the shapes have as many parameters as their sources say."""

import inspect

import pytest

from jaxllm.config import ModelConfig, presets
from jaxllm.errors import InputError
from jaxllm.plan.budget import num_active_parameters, num_parameters

KNOWN = {
    "tiny_1m": 920_704,
    "small_15m": 15_191_712,
    "base_124m": 123_689_472,
    "llama_350m": 367_969_280,
    "llama_1b": 1_235_814_400,
    "llama_3b": 3_212_749_824,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
    "qwen3_0_6b": 596_049_920,
    "gemma_like_1b": 946_146_432,
    "tiny_moe_3m": 2_694_272,
    "mixtral_8x7b": 46_702_792_704,
    "qwen3_30b_a3b": 30_532_122_624,
}
ACTIVE = {
    "tiny_moe_3m": 924_800,
    "mixtral_8x7b": 12_879_925_248,
    "qwen3_30b_a3b": 3_353_032_704,
}


def preset(name: str, **changes) -> ModelConfig:
    return getattr(presets, name)(**changes)


def test_every_preset_is_known():
    public = inspect.getmembers(presets, inspect.isfunction)
    assert {name for name, _ in public} == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_a_preset_has_as_many_parameters_as_published_and_as_it_says(name):
    assert num_parameters(preset(name)) == KNOWN[name]
    assert f"{KNOWN[name]:,} parameters" in getattr(presets, name).__doc__


@pytest.mark.parametrize("name", KNOWN)
def test_a_token_uses_the_parameters_of_its_own_experts(name):
    assert num_active_parameters(preset(name)) == ACTIVE.get(name, KNOWN[name])
    if name in ACTIVE:
        assert f"a token uses {ACTIVE[name]:,}." in getattr(presets, name).__doc__


def test_gpt2_without_its_positions_is_the_base_model():
    positions = 1024 * 768
    model = presets.base_124m(vocab_size=50_257)
    assert num_parameters(model) == 124_439_808 - positions


@pytest.mark.parametrize("name", KNOWN)
def test_any_field_of_a_preset_can_be_changed_and_is_checked(name):
    model = preset(name, vocab_size=512, remat="full")
    assert (model.vocab_size, model.remat) == (512, "full")
    with pytest.raises(InputError, match=r"config\.model\.head_dim=3"):
        preset(name, head_dim=3)


def test_coupled_fields_of_a_preset_change_together():
    model = presets.llama_1b(num_heads=6, num_kv_heads=3, num_layers=4, windows=(8, 0))
    assert (model.num_heads, model.num_kv_heads) == (6, 3)


@pytest.mark.parametrize("name", KNOWN)
def test_a_preset_fits_the_usual_tensor_parallelism(name):
    model = preset(name)
    assert model.vocab_size % 8 == 0
    assert model.d_model % 8 == 0

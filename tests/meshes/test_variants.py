# SPDX-License-Identifier: Apache-2.0
"""Parts of published families on meshes: the losses of one device."""

import pytest

from courses import DATA, ONE_DEVICE, STEPS, WORDS, changed, check_equal, train
from jaxllm.config import Config, LossConfig, ModelConfig, OptimizerConfig, override

CONFIG = Config(
    steps=STEPS,
    model=ModelConfig(
        vocab_size=WORDS,
        num_layers=4,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=48,
        windows=(8, 0),
        dtype="float32",
    ),
    data=DATA,
    loss=LossConfig(chunk_tokens=24),
    optimizer=OptimizerConfig(
        lr=3e-3, warmup_steps=4, weight_decay=0.1, microbatches=2
    ),
)
# As Gemma 3, OLMo 2, Command R, GPT-2 and Ministral 3 with sinks.
VARIANTS = {
    "norms on both sides": {
        "model.qk_norm": True,
        "model.variant.norm_position": "both",
        "model.variant.norm_offset": True,
        "model.variant.embedding_scale": 5.5,
        "model.variant.attention_scale": 0.3,
        "model.rope.window_theta": 100.0,
    },
    "norms of outputs, over all heads": {
        "model.qk_norm": True,
        "model.variant.qk_norm": "flat",
        "model.variant.norm_position": "post",
        "model.rope.layers": (True, False),
        "model.bias": "attention",
    },
    "a parallel block": {
        "model.norm": "layernorm",
        "model.qk_norm": True,
        "model.variant.norm_bias": False,
        "model.variant.qk_norm": "layernorm",
        "model.variant.parallel": "one_norm",
        "model.variant.logit_scale": 0.5,
        "model.rope.interleaved": True,
        "model.rope.dims": 4,
    },
    "learned positions": {
        "model.norm": "layernorm",
        "model.bias": "all",
        "model.mlp": "gelu_exact",
        "model.variant.parallel": "two_norms",
        "model.variant.positions": 32,
        "model.rope.layers": (False,),
    },
    "scalings and sinks": {
        "model.mlp": "relu2",
        "model.variant.attention_sinks": True,
        "model.variant.residual_scale": 0.5,
        "model.variant.query_growth": 0.1,
        "model.variant.embedding_norm": True,
        "model.rope.scaling": "yarn",
        "model.rope.factor": 4.0,
        "model.rope.original_length": 8,
    },
}
# Each token has both experts, and nothing is clamped: no rounding moves a token to
# another expert, or a value to where it has no gradient.
VARIANTS["experts with biases"] = {
    "model.bias": "all",
    "model.moe.num_experts": 2,
    "model.moe.experts_per_token": 2,
    "model.variant.attention_sinks": True,
}
VARIANTS["chunks"] = {
    "model.qk_norm": True,
    "model.windows": (0,),
    "model.rope.layers": (True, False),
    "model.variant.qk_norm": "rotated",
    "model.variant.attention_chunk": 7,
    "model.variant.nope_growth": 0.5,
    "model.variant.nope_length": 4,
}
slow = pytest.mark.slow
PAIRS = [
    ("norms of outputs, over all heads", "data 2 x fsdp 2 x tensor 2"),
    *(
        pytest.param(name, "data 2 x fsdp 2 x tensor 2", marks=slow)
        for name in VARIANTS
        if name not in ("norms of outputs, over all heads", "experts with biases")
        and name != "chunks"
    ),
    pytest.param("scalings and sinks", "context 2 x tensor 2 x fsdp 2", marks=slow),
    pytest.param("norms on both sides", "context 2 x tensor 2 x fsdp 2", marks=slow),
    pytest.param("experts with biases", "data 2 x expert 2 x tensor 2", marks=slow),
    pytest.param("learned positions", "stage 2 x fsdp 2 x tensor 2", marks=slow),
    pytest.param("chunks", "stage 2 x context 2 x fsdp 2", marks=slow),
    pytest.param("a parallel block", "stage 2 x context 2 x fsdp 2", marks=slow),
]


@pytest.mark.parametrize(("name", "mesh"), PAIRS)
def test_20_steps_are_those_of_one_device(name, mesh):
    config = override(CONFIG, VARIANTS[name])
    stages = {"mesh.stage": 2} if "stage" in mesh else {}
    one, many = train(config, ONE_DEVICE), train(override(config, stages), mesh)
    assert changed(one, many) == []
    check_equal(f"{name}: {mesh}", one, many)

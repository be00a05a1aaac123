# SPDX-License-Identifier: Apache-2.0
"""A tiny model that fits every mesh of 8 devices, to compare meshes with each other.

    JAX_NUM_CPU_DEVICES=8 JAX_PLATFORMS=cpu python -m jaxllm.compare_meshes \\
        --config configs/any_mesh.py

A mesh axis of 8 fits every dimension that it shards: layers, microbatches, heads,
experts (if any), and rows, which need two chunks per device. docs/meshes.md says how to
make `data/words`, in which a row has many documents. Two CPU cores: ten minutes.
"""

from jaxllm.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
)


def get_config() -> Config:
    return Config(
        steps=20,
        model=ModelConfig(
            vocab_size=264,
            num_layers=8,
            d_model=32,
            num_heads=8,
            num_kv_heads=8,
            head_dim=8,
            d_ff=64,
            qk_norm=True,
            attention_softcap=20.0,
            dtype="float32",  # bfloat16 would hide errors in its rounding
        ),
        data=DataConfig(paths=("data/words",), sequence_length=64, batch_size=64),
        loss=LossConfig(chunk_tokens=128),
        optimizer=OptimizerConfig(
            lr=3e-3, warmup_steps=4, weight_decay=0.1, microbatches=8
        ),
    )

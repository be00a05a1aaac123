# SPDX-License-Identifier: Apache-2.0
"""Llama 3 8B, trained from scratch on your own tokens, on the GPUs of one node.

    python -m jaxllm.train --config configs/llama_8b.py --dry_run

Parameters, gradients and AdamW moments take 16 bytes per parameter: 120 GiB, sharded
over all GPUs. Not trained yet: --dry_run prints the plan, and docs/kernels.md has the
memory of a compiled step on 8 H200.
"""

from jaxllm.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    presets,
)


def get_config() -> Config:
    return Config(
        steps=100_000,
        model=presets.llama_8b(remat="save_attention"),
        data=DataConfig(paths=("data/corpus",), sequence_length=8192, batch_size=128),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        optimizer=OptimizerConfig(
            lr=3e-4, warmup_steps=2000, weight_decay=0.1, final_lr_fraction=0.1
        ),
        eval=EvalConfig(every=1000, batches=32),
        checkpoint=CheckpointConfig(every=1000, keep_latest=3, keep_every=10_000),
    )

# SPDX-License-Identifier: Apache-2.0
"""The quickstart for GPUs: a 28M model on the source of Python's standard library.

    python -m jaxllm.train --config configs/quickstart_gpu.py --workdir runs/gpu

Expects the tokens of `make quickstart`. Batch and parameters are sharded over all GPUs;
64 rows fit 1, 2, 4, 8, 16 or 32 of them. Not measured yet.
"""

from jaxllm.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    presets,
)


def get_config() -> Config:
    return Config(
        steps=1000,
        model=presets.small_15m(
            vocab_size=4096,
            num_layers=8,
            d_model=512,
            num_heads=8,
            num_kv_heads=8,
            head_dim=64,
            d_ff=1408,
            qk_norm=True,
        ),
        data=DataConfig(paths=("data/stdlib",), sequence_length=512, batch_size=64),
        optimizer=OptimizerConfig(
            name="muon",
            lr=5e-3,
            schedule="wsd",
            warmup_steps=50,
            decay_fraction=0.4,
            final_lr_fraction=0.0,
            weight_decay=0.1,
            b1=0.95,
        ),
        eval=EvalConfig(every=250, batches=0),
        checkpoint=CheckpointConfig(every=250, keep_best=True),
    )

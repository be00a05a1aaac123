# SPDX-License-Identifier: Apache-2.0
"""A small model that learns to write Python, on two CPU cores.

    python -m jaxllm.train --config configs/quickstart.py --workdir runs/quickstart

Expects the tokens of `python -m jaxllm.tokenize --input python:stdlib
--output data/stdlib --tokenizer bpe:4096 --holdout 0.05`; `make quickstart` does all,
in 3 minutes after the installation, to a held-out loss of 3.78 nats per token.
"""

from jaxllm.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
)


def get_config() -> Config:
    return Config(
        steps=560,
        model=ModelConfig(
            vocab_size=4096,
            num_layers=4,
            d_model=128,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            d_ff=384,
            tie_embeddings=True,
            qk_norm=True,
            dtype="float32",  # CPUs multiply float32 faster than bfloat16
        ),
        data=DataConfig(paths=("data/stdlib",), sequence_length=256, batch_size=8),
        optimizer=OptimizerConfig(
            name="muon",
            lr=1e-2,
            schedule="wsd",
            warmup_steps=30,
            decay_fraction=0.5,
            final_lr_fraction=0.0,
            weight_decay=0.1,
        ),
        eval=EvalConfig(every=280, batches=16),
        checkpoint=CheckpointConfig(every=140),
        logging=LoggingConfig(every=10),
    )

# SPDX-License-Identifier: Apache-2.0
"""What a run is: every setting and its checks, model sizes by name, config files.

Standard library only: a config can be read, written and refused without importing JAX.
"""

from jaxllm.config import presets
from jaxllm.config.files import load_config, override
from jaxllm.config.model import ModelConfig
from jaxllm.config.moe import MoEConfig, MoEVariantConfig
from jaxllm.config.sections import (
    AnomalyConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    KernelsConfig,
    LoggingConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
)
from jaxllm.config.variant import RopeConfig, VariantConfig

__all__ = [
    "AnomalyConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "KernelsConfig",
    "LoggingConfig",
    "LossConfig",
    "MeshConfig",
    "MoEConfig",
    "MoEVariantConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RopeConfig",
    "VariantConfig",
    "load_config",
    "override",
    "presets",
]

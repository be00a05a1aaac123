# SPDX-License-Identifier: Apache-2.0
"""Models of Hugging Face's transformers: read, written and verified."""

from jaxllm.hf.folder import model_config
from jaxllm.hf.loading import load

__all__ = ["load", "model_config"]

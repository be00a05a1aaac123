# SPDX-License-Identifier: Apache-2.0
"""The transformer: one definition for every mesh."""

from jaxllm.models.model import Model, logits
from jaxllm.models.transformer import Transformer, make_cache

__all__ = ["Model", "Transformer", "logits", "make_cache"]

# SPDX-License-Identifier: Apache-2.0
"""Generation of tokens and text."""

from jaxllm.inference.generation import generate, load_for_generation
from jaxllm.inference.sampling import Sampling

__all__ = ["Sampling", "generate", "load_for_generation"]

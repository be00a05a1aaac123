# SPDX-License-Identifier: Apache-2.0
"""Generation of tokens and text."""

from jaxllm.inference.generation import generate, load_for_generation
from jaxllm.inference.request import Request, read_request
from jaxllm.inference.sampling import Sampling

__all__ = ["Request", "Sampling", "generate", "load_for_generation", "read_request"]

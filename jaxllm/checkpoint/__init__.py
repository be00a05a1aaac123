# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run: the only package that imports Orbax."""

from jaxllm.checkpoint.checkpoints import Checkpoints
from jaxllm.checkpoint.reading import verify_step
from jaxllm.checkpoint.steps import find_steps

__all__ = ["Checkpoints", "find_steps", "verify_step"]

# SPDX-License-Identifier: Apache-2.0
"""One update of a model: a pure function, compiled ahead of time."""

from jaxllm.step.compiled import (
    Batch,
    compile_check,
    compile_eval,
    compile_step,
    forward,
    gradients,
    in_zigzag,
)
from jaxllm.step.setup import Setup, TrainState, init_state, prepare, state_of

__all__ = [
    "Batch",
    "Setup",
    "TrainState",
    "compile_check",
    "compile_eval",
    "compile_step",
    "forward",
    "gradients",
    "in_zigzag",
    "init_state",
    "prepare",
    "state_of",
]

# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU as our kernels use it, on a GPU and in interpret mode."""

from pallas_kernels.mosaic.interpreter import interpret, is_interpreted
from pallas_kernels.mosaic.kernel import (
    Zeros,
    accumulate,
    accumulate_loop,
    add_to_global,
    kernel,
    wgmma,
)

__all__ = [
    "Zeros",
    "accumulate",
    "accumulate_loop",
    "add_to_global",
    "interpret",
    "is_interpreted",
    "kernel",
    "wgmma",
]

# SPDX-License-Identifier: Apache-2.0
"""Casts to 8-bit floats with scales: the ground of training in fp8.

No config uses it yet; a training step in fp8 will. There is no `tiles.py`: scales are
of 128 x 128 blocks, so a CUDA block's work is given.
"""

from pallas_kernels.quantize.op import choose_quantize, quantize
from pallas_kernels.quantize.reference import Quantized, dequantize

__all__ = ["Quantized", "choose_quantize", "dequantize", "quantize"]

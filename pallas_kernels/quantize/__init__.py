# SPDX-License-Identifier: Apache-2.0
"""Casts to 8-bit floats with scales, the ground for training in fp8."""

from pallas_kernels.quantize.op import choose_quantize, quantize
from pallas_kernels.quantize.reference import Quantized, dequantize

__all__ = ["Quantized", "choose_quantize", "dequantize", "quantize"]

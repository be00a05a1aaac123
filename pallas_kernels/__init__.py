# SPDX-License-Identifier: Apache-2.0
"""The operations that have a kernel or will: one folder each, JAX the only import.

`reference.py` of a folder is the operation in plain JAX and its specification;
`op.py` is the public function: it checks arguments and picks the implementation.
"""

from pallas_kernels.attention import attention, choose_attention
from pallas_kernels.cross_entropy import choose_cross_entropy, linear_cross_entropy
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.norm import choose_norm, layer_norm, rms_norm
from pallas_kernels.quantize import dequantize, quantize

__all__ = [
    "attention",
    "choose_attention",
    "choose_cross_entropy",
    "choose_norm",
    "dequantize",
    "grouped_matmul",
    "layer_norm",
    "linear_cross_entropy",
    "quantize",
    "rms_norm",
]

# SPDX-License-Identifier: Apache-2.0
"""The operations that have a kernel: one folder each, JAX the only import.

The files of a folder have the same names everywhere:

- `op.py`: the public function, which checks arguments and picks the implementation, and
  its `choose_<operation>`;
- `reference.py`: the operation in plain JAX, its specification;
- `tiles.py`: how its kernels are divided, by default and as a search may try it;
- `cases.py`: calls at the shapes of models, to compile, to check and to time;
- `hopper/`: what is for NVIDIA Hopper, the kernels themselves.
"""

from pallas_kernels.attention import attention, choose_attention
from pallas_kernels.cross_entropy import choose_cross_entropy, linear_cross_entropy
from pallas_kernels.grouped_matmul import choose_grouped_matmul, grouped_matmul
from pallas_kernels.norm import choose_norm, layer_norm, rms_norm
from pallas_kernels.quantize import choose_quantize, dequantize, quantize

__all__ = [
    "attention",
    "choose_attention",
    "choose_cross_entropy",
    "choose_grouped_matmul",
    "choose_norm",
    "choose_quantize",
    "dequantize",
    "grouped_matmul",
    "layer_norm",
    "linear_cross_entropy",
    "quantize",
    "rms_norm",
]

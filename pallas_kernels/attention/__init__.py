# SPDX-License-Identifier: Apache-2.0
"""Softmax attention of a decoder."""

from pallas_kernels.attention.op import attention, choose_attention
from pallas_kernels.attention.partial import RangedAttention, merge_parts
from pallas_kernels.attention.ranges import key_ranges

__all__ = [
    "RangedAttention",
    "attention",
    "choose_attention",
    "key_ranges",
    "merge_parts",
]

# SPDX-License-Identifier: Apache-2.0
"""Matrix products of rows that are sorted by group, such as tokens by expert."""

from pallas_kernels.grouped_matmul.op import choose_grouped_matmul, grouped_matmul
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference

__all__ = ["choose_grouped_matmul", "grouped_matmul", "grouped_matmul_reference"]

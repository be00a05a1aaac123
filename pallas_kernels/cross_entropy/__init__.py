# SPDX-License-Identifier: Apache-2.0
"""Output projection and cross-entropy in one operation."""

from pallas_kernels.cross_entropy.op import choose_cross_entropy, linear_cross_entropy
from pallas_kernels.cross_entropy.reference import Terms

__all__ = ["Terms", "choose_cross_entropy", "linear_cross_entropy"]

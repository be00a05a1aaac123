# SPDX-License-Identifier: Apache-2.0
"""Normalisation over the last dim."""

from pallas_kernels.norm.op import choose_norm, layer_norm, rms_norm

__all__ = ["choose_norm", "layer_norm", "rms_norm"]

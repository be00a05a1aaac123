# SPDX-License-Identifier: Apache-2.0
"""Calls of attention at the shapes of models: to compile, to check and to time."""

from pallas_kernels.attention.cases.cases import cases, tiny_cases

__all__ = ["cases", "tiny_cases"]

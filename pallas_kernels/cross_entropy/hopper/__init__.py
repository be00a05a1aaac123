# SPDX-License-Identifier: Apache-2.0
"""The cross-entropy kernels of NVIDIA Hopper (sm_90a)."""

# SPDX-License-Identifier: Apache-2.0
"""The grouped matmul kernels of NVIDIA Hopper (sm_90a)."""

# SPDX-License-Identifier: Apache-2.0
"""The norm kernels of NVIDIA Hopper (sm_90a)."""

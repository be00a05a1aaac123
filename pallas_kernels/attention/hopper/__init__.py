# SPDX-License-Identifier: Apache-2.0
"""The attention kernels of NVIDIA Hopper (sm_90a)."""

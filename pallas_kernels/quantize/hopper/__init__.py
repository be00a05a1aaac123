# SPDX-License-Identifier: Apache-2.0
"""The quantization kernel of NVIDIA Hopper (sm_90a)."""

# SPDX-License-Identifier: Apache-2.0
"""What a run will take, known before it starts: memory, FLOPs, kernels."""

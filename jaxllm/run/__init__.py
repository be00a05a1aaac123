# SPDX-License-Identifier: Apache-2.0
"""A run on the host: opening, resuming, evaluation, checkpoints."""

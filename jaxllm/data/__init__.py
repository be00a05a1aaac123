# SPDX-License-Identifier: Apache-2.0
"""Converts tokens to batches: file formats, splits, packing, mixtures."""

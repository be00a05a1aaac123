# SPDX-License-Identifier: Apache-2.0
"""From tokens to batches: formats, splits, packing, mixtures."""

# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: routing, dispatch, the experts and the layer made of them."""

# SPDX-License-Identifier: Apache-2.0
"""Converts text to a token folder."""

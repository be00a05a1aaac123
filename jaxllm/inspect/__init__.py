# SPDX-License-Identifier: Apache-2.0
"""Inspection of a step: its compiled program, its trace, its norms by layer."""

# SPDX-License-Identifier: Apache-2.0
"""Looking into a step: its compiled program, its trace, its numbers layer by layer."""

# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how they start, agree, are watched, and stop together."""

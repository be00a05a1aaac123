# SPDX-License-Identifier: Apache-2.0
"""Records of a run: its metrics, the ledger of its time, its console."""

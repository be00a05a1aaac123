# SPDX-License-Identifier: Apache-2.0
"""What a run writes down and shows: metrics, the ledger of its time, the console."""

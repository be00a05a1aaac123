# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: launch, agreement, watchdog, and a joint stop."""

# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of every operation on a GPU, beside other libraries: see `__main__`."""

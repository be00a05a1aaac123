# SPDX-License-Identifier: Apache-2.0
"""Compilation for GPUs that are not there, and the record of what kernels take."""

from pallas_kernels.offline.compile import (
    TOOLCHAIN_VARIABLE,
    Compiled,
    Resources,
    compile_in_subprocess,
    described_devices,
    described_mesh,
    run_python,
    toolchain,
)

__all__ = [
    "TOOLCHAIN_VARIABLE",
    "Compiled",
    "Resources",
    "compile_in_subprocess",
    "described_devices",
    "described_mesh",
    "run_python",
    "toolchain",
]

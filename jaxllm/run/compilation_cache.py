# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept on disk, so that the same command starts at once next time."""

import os
from pathlib import Path

import jax


def use_compilation_cache():
    """Keeps compiled programs in ~/.cache/jaxllm, unless JAX was given another place.

    JAX_COMPILATION_CACHE_DIR names another place; XDG_CACHE_HOME moves ~/.cache.
    """
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "jaxllm"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

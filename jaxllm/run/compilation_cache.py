# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept on disk, so that the same command starts at once next time."""

import glob
import logging
import os
import re
import warnings
import zlib
from pathlib import Path

import jax

# What JAX says of an entry that it cannot read. It then compiles the program, but does
# not write it: a file of that name is there already.
_UNREADABLE = re.compile(
    r"Error reading persistent compilation cache entry for '(?P<program>[^']+)'"
)
_MIN_COMPILE_TIME = "jax_persistent_cache_min_compile_time_secs"
_log = logging.getLogger(__name__)
_show_others = warnings.showwarning


def use_compilation_cache():
    """Keeps compiled programs in ~/.cache/jaxllm, unless JAX was given another place.

    JAX_COMPILATION_CACHE_DIR names another place; XDG_CACHE_HOME moves ~/.cache. An
    entry that a killed process or a full disk left damaged is removed when JAX meets
    it, and written anew.
    """
    if jax.config.jax_compilation_cache_dir is None and (folder := _own_folder()):
        jax.config.update("jax_compilation_cache_dir", folder)
    if _MIN_COMPILE_TIME.upper() not in os.environ:
        jax.config.update(_MIN_COMPILE_TIME, 0.2)
    _watch_warnings()


def _own_folder() -> str | None:
    """Returns the folder for programs; None, and says so, if there can be none."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder, why = os.path.join(root, "jaxllm"), ""
    if root.startswith("~"):  # as for a bare user id in a container
        why = "this user has no home directory"
    else:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            why = f"{folder}: {error.strerror}"
        else:
            why = "" if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    if why:
        _log.warning(
            "Compiled programs are not kept for the next start: %s; "
            "JAX_COMPILATION_CACHE_DIR can name another folder.",
            why,
        )
    return None if why else folder


def _watch_warnings():
    global _show_others
    if warnings.showwarning is not _show:
        _show_others, warnings.showwarning = warnings.showwarning, _show


def _show(message, category, filename, lineno, file=None, line=None):
    """Removes the entry that a warning of JAX is about; shows all other warnings."""
    found = _UNREADABLE.match(str(message))
    removed = _remove_damaged(found["program"]) if found else []
    for path in removed:
        _log.warning("%s was damaged; it is compiled and written anew.", path)
    if not removed:
        _show_others(message, category, filename, lineno, file, line)


def _remove_damaged(program: str) -> list[Path]:
    """Removes the damaged entries of a program; returns their paths.

    Other processes may read, write or remove the same ones meanwhile: JAX compiles what
    is not there, and writes all of it.
    """
    folder = Path(jax.config.jax_compilation_cache_dir)
    # The rest of a name is a hash of the program, its options and the devices.
    entries = folder.glob(f"{glob.escape(program)}*-cache")
    return [path for path in entries if _is_damaged(path) and _has_removed(path)]


def _is_damaged(path: Path) -> bool:
    try:
        zlib.decompress(path.read_bytes())
    except zlib.error:
        return True
    except OSError:  # removed meanwhile, or of another user: not ours to judge
        return False
    return False


def _has_removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True

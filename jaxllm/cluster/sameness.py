# SPDX-License-Identifier: Apache-2.0
"""What all processes of a run must have in common, compared when they have met.

Each process computes its own shards of one program. If one of them had other settings,
tokens or code, none would notice: shards would be updated by different rules, or a
collective would wait for ever.
"""

import collections
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.config import Config
from jaxllm.config.files import config_to_dict
from jaxllm.config.saved import flatten
from jaxllm.errors import InputError

# Hosts may reach the same tokens by other paths: their fingerprints are compared.
_BY_HOST = ("data.paths", "data.eval_paths")
_LIBRARIES = (
    *("jaxllm", "jax", "jaxlib", "flax", "optax", "numpy", "grain"),
    "orbax-checkpoint",
)
_PACKAGES = ("jaxllm", "sharding", "pallas_kernels")
# Settings of JAX that change numbers or the program.
_OF_JAX = (
    *("jax_default_matmul_precision", "jax_default_prng_impl", "jax_enable_x64"),
    *("jax_numpy_dtype_promotion", "jax_threefry_partitionable"),
)
_SHOWN = 8  # facts, values of each, and processes of each value, in a message
_SHOWN_CHARACTERS = 40  # of a value


def check_same(config: Config, facts: Mapping[str, Any]) -> None:
    """Checks that all processes have the same config, facts, libraries and code.

    Args:
      config: of the run.
      facts: what else decides the numbers, by name; values can be written as JSON.

    Raises:
      InputError: on every process, with the names that differ and on which process.
    """
    if jax.process_count() == 1:
        return
    every = {**_settings(config), **facts, **_program()}
    texts = _gather(json.dumps(every, default=str, sort_keys=True))
    if difference := describe_difference([json.loads(text) for text in texts]):
        raise InputError(
            f"the processes of a run must have the same settings, tokens and code; "
            f"here differ: {difference}. Start all of them with the same command, on "
            "the same files."
        )


def describe_difference(facts: Sequence[Mapping[str, Any]]) -> str:
    """Returns the names whose values differ, with the processes that have each value.

    Args:
      facts: of each process.
    """
    found = []
    for name in sorted(set().union(*facts)):
        processes = collections.defaultdict(list)
        for process, mine in enumerate(facts):
            processes[_shown(mine.get(name))].append(process)
        if len(processes) > 1:
            values = [f"{v} in {_named(p)}" for v, p in processes.items()]
            found.append(f"{name}: {_first(values, ', ')}")
    return _first(found, "; ")


def _first(parts: Sequence[str], separator: str) -> str:
    more = [f"and {len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
    return separator.join([*parts[:_SHOWN], *more])


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    # Values that begin alike must not look the same.
    return f"{text[:_SHOWN_CHARACTERS]}... (sha256 {_hash(text.encode())})"


def _named(processes: Sequence[int]) -> str:
    noun = "process" if len(processes) == 1 else "processes"
    return f"{noun} {_first([str(process) for process in processes], ' ')}"


def _settings(config: Config) -> dict[str, Any]:
    settings = flatten(config_to_dict(config))
    return {f"config.{n}": v for n, v in settings.items() if n not in _BY_HOST}


@functools.cache
def _program() -> dict[str, Any]:
    """Returns the libraries, JAX's settings and the code of this process."""
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    of_jax = {name: str(getattr(jax.config, name)) for name in _OF_JAX}
    return {**versions, **of_jax, "the source code of jaxllm": _source_hash()}


def _source_hash() -> str:
    found = hashlib.sha256()
    root = Path(__file__).parents[2]
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            found.update(f"{path.relative_to(root)}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _gather(text: str) -> list[str]:
    """Returns the text of each process; equal ones travel as their hashes."""
    encoded = text.encode()
    sizes_and_hashes = _all(_hash(encoded).encode() + len(encoded).to_bytes(4))
    if len(set(sizes_and_hashes)) == 1:
        return [text]
    sizes = [int.from_bytes(each[-4:]) for each in sizes_and_hashes]
    padded = _all(encoded.ljust(max(sizes)))
    return [each[:size].decode() for each, size in zip(padded, sizes, strict=True)]


def _all(data: bytes) -> list[bytes]:
    """Returns the bytes of each process, which all have the same number."""
    mine = np.frombuffer(data, np.uint8)
    return [bytes(row) for row in np.asarray(multihost_utils.process_allgather(mine))]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]

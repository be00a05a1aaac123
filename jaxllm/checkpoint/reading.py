# SPDX-License-Identifier: Apache-2.0
"""Restores one checkpoint, and compares it with its checksums."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxllm.checkpoint.checksum import checksums
from jaxllm.checkpoint.faults import check_files, reading
from jaxllm.checkpoint.label import DATA, Label, read_label
from jaxllm.checkpoint.leftovers import end_leftovers
from jaxllm.errors import DamagedError, InputError

_GROUP_BYTES = 2**29  # of arrays that are verified together
_log = logging.getLogger(__name__)


def read_step(folder: Path, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """Returns state and data of a step, placed as abstract_state says.

    Raises:
      InputError: abstract_state has other arrays.
      DamagedError: it is not what was saved.
      CheckpointError: it cannot be read now.
    """
    label = read_label(folder)
    check_files(folder)
    _check_fit(folder, label, abstract_state)
    state = _load(folder, abstract_state)
    _compare(folder, label, checksums(state))
    return state, label.data


def read_params(folder: Path, abstract_params: Any) -> Any:
    """Returns the parameters of a step, without reading the rest; raises the same."""
    wanted, label = {"params": abstract_params}, read_label(folder)
    check_files(folder)
    _check_fit(folder, label, wanted, within="params/")
    found = _load(folder, wanted)
    _compare(folder, label, checksums(found))
    return found["params"]


def verify_step(folder: Path) -> int | None:
    """Reads every array of a step, a few at a time; returns how many there are.

    None if it was saved without checksums, and cannot be verified.

    Raises:
      DamagedError: it is not what was saved.
      CheckpointError: it cannot be read now.
    """
    label = read_label(folder)
    if not label.checksums:
        return None
    check_files(folder)
    tree = _saved_arrays(folder)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [_name(path) for path, _ in leaves]
    if missing := label.checksums.keys() - {DATA, *names}:
        raise DamagedError(f"{folder} is damaged: {min(missing)} is not there.")
    for group in _groups([math.prod(x.shape) * x.dtype.itemsize for _, x in leaves]):
        wanted: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
        for index in group:
            leaf = leaves[index][1]
            wanted[index] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        found = jax.tree.leaves(_load(folder, structure.unflatten(wanted), omits=False))
        sums = checksums({names[index]: found[index] for index in group})
        _compare(folder, label, sums)
    return len(leaves)


def _groups(sizes: list[int]) -> Iterator[list[int]]:
    """Yields numbers of arrays of at most _GROUP_BYTES, or of a single larger one."""
    group, total = [], 0
    for index, size in enumerate(sizes):
        if group and total + size > _GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(index)
        total += size
    yield group


def orbax_context(*, omits: bool = True) -> ocp.Context:
    """Returns the settings with which Orbax reads and writes all of ours.

    Args:
      omits: what is asked for may lack arrays; else it has PLACEHOLDER for them, and
        Orbax takes only one of both.
    """
    context = ocp.Context()
    # Float32 weights shrink by 8 % only, for twice the time of a save.
    context.array.saving.use_compression = False
    context.array.saving.enable_write_sharding_file = False  # read by nobody here
    context.pytree.loading.partial_load = omits  # strict all the same, by `_check_fit`
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
    context.checkpointables.registry = registry
    return context


def _load(folder: Path, abstract_state: Any, *, omits: bool = True) -> Any:
    placed, context = _placed(abstract_state), orbax_context(omits=omits)
    with reading(folder), jax.transfer_guard("allow"), context:
        try:  # Orbax takes no relative path
            path = str(folder.absolute())
            return ocp.load(path, placed, checkpointable_name="state")
        except Exception:
            end_leftovers()
            raise


def _check_fit(folder: Path, label: Label, abstract: Any, *, within: str = "") -> None:
    saved = label.arrays or describe(_saved_arrays(folder))
    wanted = describe(abstract)
    faults = [
        f"{name} is {saved.get(name, 'absent')} there, "
        f"and {wanted.get(name, 'absent')} here"
        for name in sorted(saved.keys() | wanted.keys())
        if name.startswith(within) and saved.get(name) != wanted.get(name)
    ]
    if faults:
        shown = "\n  ".join(faults[:8] + ["..."] * (len(faults) > 8))
        raise InputError(
            f"{folder} does not fit the model or optimizer of this config, in "
            f"{len(faults)} arrays:\n  {shown}\nUse the config, and the version of "
            "jaxllm, that the run was started with, or give another --workdir."
        )


def _saved_arrays(folder: Path) -> Any:
    with reading(folder), orbax_context():
        # Orbax takes no relative path.
        metadata = ocp.metadata(str(folder.absolute()), checkpointable_name="state")
        if metadata.metadata is None:  # what it returns after a warning
            end_leftovers()
            raise ValueError("no description of its arrays")
        return metadata.metadata


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _compare(folder: Path, label: Label, found: dict[str, str]) -> None:
    """Raises DamagedError if what was read is not what was saved."""
    if not label.checksums:
        _log.warning("%s has no checksums, as older saves: it is not checked.", folder)
        return
    saved = label.checksums
    if wrong := [name for name in found if saved.get(name) != found[name]]:
        raise DamagedError(
            f"{folder} is damaged: {len(wrong)} of {len(found)} arrays are not what "
            f"was saved, first {wrong[0]}."
        )


def describe(tree: Any) -> dict[str, str]:
    """Returns what each array of a tree is, like {"params/embed": "float32[8, 4]"}."""
    return {
        _name(path): (f"{leaf.dtype}{list(leaf.shape)}")
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _placed(abstract: Any) -> Any:
    """Returns `abstract` with a sharding for every array that is asked for."""
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf: Any) -> Any:
        if leaf is ocp.PLACEHOLDER:
            return leaf
        sharding = leaf.sharding or single
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, abstract)

# SPDX-License-Identifier: Apache-2.0
"""Restores one checkpoint, and compares it with its checksums."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxllm.checkpoint.checksum import checksums, json_checksum
from jaxllm.checkpoint.leftovers import end_leftovers
from jaxllm.errors import CheckpointError, InputError

_log = logging.getLogger(__name__)
_CHECKSUMS = "checksums"  # in data.json, by path of the array
_DATA = "data"  # the entry of data.json itself


def with_checksums(state: Any, data: dict[str, Any]) -> dict[str, Any]:
    """Returns data with the checksums of the state and of itself."""
    return {**data, _CHECKSUMS: {**checksums(state), _DATA: json_checksum(data)}}


def read_step(folder: Path, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """Returns state and data of a step, placed as abstract_state says.

    Raises:
      InputError: abstract_state has other arrays.
      CheckpointError: it cannot be read, or is damaged.
    """
    _check_fit(folder, abstract_state)
    data, saved = _read_data(folder)
    state = _load(folder, abstract_state)
    _compare(folder, saved, {**checksums(state), _DATA: json_checksum(data)})
    return state, data


def read_params(folder: Path, abstract_params: Any) -> Any:
    """Returns the parameters of a step, without reading the rest; raises the same."""
    wanted = {"params": abstract_params}
    _check_fit(folder, wanted, within="params/")
    _, saved = _read_data(folder)
    found = _load(folder, wanted)
    _compare(folder, saved, checksums(found))
    return found["params"]


def verify_step(folder: Path) -> int:
    """Reads every array of a step, one by one; returns how many there are.

    Raises:
      CheckpointError: it cannot be read, or is not what was saved, or has no checksums.
    """
    data, saved = _read_data(folder)
    if not saved:
        raise CheckpointError(f"{folder} has no checksums to compare with.")
    _compare(folder, saved, {_DATA: json_checksum(data)})
    arrays = jax.tree_util.tree_flatten_with_path(_saved_arrays(folder))[0]
    for path, leaf in arrays:
        one = leaf
        for key in reversed(path):
            one = {key.key: one}
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), one)
        _compare(folder, saved, checksums(_load(folder, abstract)))
    if missing := saved.keys() - {_DATA} - {_name(path) for path, _ in arrays}:
        raise CheckpointError(f"{folder} is damaged: {min(missing)} is not there.")
    return len(arrays)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Returns a JSON file of a step; raises CheckpointError if it is not one."""
    with _reading(folder):
        return json.loads((folder / name).read_text(encoding="utf-8"))


def orbax_context() -> ocp.Context:
    """Returns the settings with which Orbax reads and writes all of ours."""
    context = ocp.Context()
    # Float32 weights shrink by 8 % only, for twice the time of a save.
    context.array.saving.use_compression = False
    context.array.saving.enable_write_sharding_file = False  # read by nobody here
    context.pytree.loading.partial_load = True  # strict all the same, by `_check_fit`
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
    context.checkpointables.registry = registry
    return context


def _load(folder: Path, abstract_state: Any) -> Any:
    placed = _placed(abstract_state)
    with _reading(folder), jax.transfer_guard("allow"), orbax_context():
        try:
            return ocp.load(str(folder), placed, checkpointable_name="state")
        except Exception:
            end_leftovers()
            raise


def _check_fit(folder: Path, abstract: Any, *, within: str = "") -> None:
    saved, wanted = _describe(_saved_arrays(folder)), _describe(abstract)
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
    with _reading(folder), orbax_context():
        metadata = ocp.metadata(str(folder), checkpointable_name="state").metadata
        if metadata is None:  # what Orbax returns after a warning
            end_leftovers()
            raise ValueError("no description of its arrays")
        return metadata


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _read_data(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns what was saved beside the state, and the checksums of both."""
    data = read_json(folder, "data/data.json")
    return data, data.pop(_CHECKSUMS, {})


def _compare(folder: Path, saved: dict[str, str], found: dict[str, str]) -> None:
    """Raises CheckpointError if what was read is not what was saved."""
    if not saved:
        _log.warning("%s has no checksums, as older saves: it is not checked.", folder)
        return
    if wrong := [name for name in found if saved.get(name) != found[name]]:
        raise CheckpointError(
            f"{folder} is damaged: {len(wrong)} of {len(found)} parts are not what was "
            f"saved, first {wrong[0]}."
        )


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{folder} cannot be read ({reason(error)}). If it is damaged, rename or "
            "remove that folder: the same command resumes from the step before it."
        ) from error


def _describe(tree: Any) -> dict[str, str]:
    """Returns what each array of a tree is, like {"params/embed": "float32[8, 4]"}."""
    return {
        _name(path): (f"{leaf.dtype}{list(leaf.shape)}")
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _placed(abstract: Any) -> Any:
    """Returns `abstract` with a sharding for every array."""
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding or single
        ),
        abstract,
    )


def reason(error: Exception) -> str:
    """Returns the first line of an error, to be put into a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")

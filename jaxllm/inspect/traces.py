# SPDX-License-Identifier: Apache-2.0
"""Traces of jax's profiler: the operations of one device and when they ran.

GPUs: each kernel, with the instruction that it is of. Kernels of a CUDA graph have the
graph's name instead (which is why a profiled run has none): XLA names those of fusions
like the instruction, Mosaic ours like the call, and libraries' have names of their own.
CPUs: each instruction, by the thread that ran it.
"""

import collections
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxllm.inspect.operations import Operation

Stats = dict[str, Any]  # of an event

MOSAIC_SUFFIX = "_mosaic_gpu_kernel"  # of the names of our kernels
OUTSIDE = "outside"  # the operation of what other programs ran


@dataclasses.dataclass(frozen=True)
class Event:
    """One run of an operation on a device."""

    operation: str  # key of what `read_operations` returns; or a kernel's name
    start_ns: float
    end_ns: float


def read_events(
    folder: Path, module: str, operations: Mapping[str, Operation]
) -> list[Event]:
    """Returns the operations of the first device in a trace, without loops as such.

    Args:
      folder: of `jax.profiler.start_trace`.
      module: of the program, such as "jit_train_step".
      operations: of the program.

    Raises:
      FileNotFoundError: there is no trace.
    """
    paths = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no trace of jax.profiler.")
    with warnings.catch_warnings():
        # jaxlib's reader warns of itself, in C++, where an error would be an abort.
        warnings.simplefilter("ignore", DeprecationWarning)
        data = jax.profiler.ProfileData.from_file(str(paths[-1]))
        gpus = sorted(p.name for p in data.planes if p.name.startswith("/device:GPU"))
        events = list(_on_gpu(data, gpus[0]) if gpus else _on_cpu(data))
    names = _names_of_kernels(operations)
    found = []
    for event, stats in events:
        name = str(stats.get("hlo_op", ""))
        if name not in operations:  # "command_buffer_7", or nothing
            kernel = str(event.name).removesuffix(MOSAIC_SUFFIX)
            name = names.get(kernel, kernel)
        if stats.get("hlo_module", module) != module:
            name = OUTSIDE
        elif name in operations and operations[name].kind == "control":
            continue
        end_ns = event.start_ns + event.duration_ns
        found.append(Event(name, event.start_ns, end_ns))
    return found


def _on_gpu(data: Any, name: str) -> Iterator[tuple[Any, Stats]]:
    """Yields what ran in the streams of a GPU; other lines are derived from these."""
    for plane in data.planes:
        for line in plane.lines if plane.name == name else ():
            if line.name.startswith("Stream"):
                yield from ((event, dict(event.stats)) for event in line.events)


def _on_cpu(data: Any) -> Iterator[tuple[Any, Stats]]:
    """Yields what ran of the first of the devices that a CPU simulates."""
    found = []
    for plane in data.planes:
        for line in plane.lines if plane.name.startswith("/host:CPU") else ():
            all_stats = ((event, dict(event.stats)) for event in line.events)
            found += [(event, stats) for event, stats in all_stats if "hlo_op" in stats]
    first = min((stats.get("device_ordinal", 0) for _, stats in found), default=0)
    yield from (pair for pair in found if pair[1].get("device_ordinal", 0) == first)


def _names_of_kernels(operations: Mapping[str, Operation]) -> dict[str, str]:
    """Returns operations by what their kernels are called, where that tells them."""
    names = [(name.replace(".", "_").replace("-", "_"), name) for name in operations]
    for name, operation in operations.items():
        path = operation.op_name.split("/")
        if operation.kind == "kernel" and len(path) > 1:
            names.append((path[-2], name))
    times = collections.Counter(kernel for kernel, _ in names)
    return {kernel: name for kernel, name in names if times[kernel] == 1}

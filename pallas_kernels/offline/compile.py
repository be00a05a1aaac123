# SPDX-License-Identifier: Apache-2.0
"""Compilation for NVIDIA GPUs on a machine without one, and what the compiler says."""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels.case import Case
from pallas_kernels.tuning import DEVICES

TOOLCHAIN_VARIABLE = "PALLAS_KERNELS_CUDA"

Candidate = tuple[int, int]  # number of a search of a case, and of a tile of it


@dataclasses.dataclass(frozen=True)
class Resources:
    """What ptxas and the disassembler say of one kernel."""

    kernel: str
    registers: int  # per thread, at entry
    spill_bytes: int  # stores and loads
    stack_bytes: int
    shared_bytes: int
    hgmma: int  # tensor-core instructions in the text of the kernel
    serialized_wgmma: bool  # ptxas waits after each one: C7510 and its like


@dataclasses.dataclass(frozen=True)
class Compiled:
    """How the compilation of a case ended."""

    status: int  # 0, or that of the process: a wrong instruction aborts LLVM
    output: str
    kernels: tuple[Resources, ...]


def described_devices(
    num_devices: int, device: str = "nvidia_h200", gpus_per_host: int = 8
) -> Sequence[Any]:
    """Returns GPUs that are described, not there; needs the CUDA plugin."""
    hosts, rest = divmod(num_devices, gpus_per_host)
    shape = f"1x{hosts}x{gpus_per_host}" if hosts and not rest else f"1x1x{num_devices}"
    described = topologies.get_topology_desc(
        "described",
        platform="cuda",
        target_config=(DEVICES / f"{device}.txtpb").read_text(),
        topology=shape,
    )
    return described.devices


def described_mesh(
    dims: Sequence[int] = (1,), names: Sequence[str] = ("device",)
) -> jax.sharding.Mesh:
    """Returns a mesh of `described_devices`, with Explicit axes.

    Lower a jitted function under `jax.set_mesh` of it, on `jax.ShapeDtypeStruct`s with
    shardings, and compile: the result has a memory analysis and its HLO text.
    """
    return jax.sharding.Mesh(
        np.array(described_devices(int(np.prod(dims)))).reshape(dims),
        tuple(names),
        axis_types=(jax.sharding.AxisType.Explicit,) * len(names),
    )


def compile_case(
    case: Case, implementation: str = "mosaic", candidate: Candidate | None = None
) -> Any:
    """Returns a case compiled for one described GPU; see `described_mesh`.

    Args:
      case: the call.
      implementation: key of its functions.
      candidate: a tile of a search of the case, to compile with instead.
    """
    function = case.functions[implementation]
    if candidate is not None:
        search = case.searches[candidate[0]]
        function = search.function(search.tiles[candidate[1]])
    mesh = described_mesh()
    whole = jax.NamedSharding(mesh, jax.P())
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in case.inputs
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile()


def toolchain() -> Path | None:
    """Returns the folder of CUDA packages, or None: see `make .venv/cuda`."""
    named = os.environ.get(TOOLCHAIN_VARIABLE)
    folder = Path(named) if named else Path(sys.prefix) / "cuda"
    return folder if (folder / "jax_plugins").is_dir() else None


def compile_in_subprocess(
    operation: str, name: str, candidate: Candidate | None = None
) -> Compiled:
    """Compiles one case in a process of its own and reads what the compiler said.

    Args:
      operation: folder of the operation.
      name: of the case.
      candidate: see `compile_case`.

    Raises:
      FileNotFoundError: there is no toolchain.
    """
    folder = _existing_toolchain()
    which = [] if candidate is None else map(str, candidate)
    module = ["-m", "pallas_kernels.offline"]
    with tempfile.TemporaryDirectory() as dump:
        ended = run_python(
            [*module, "--child", operation, name, *which],
            MOSAIC_GPU_DUMP_TO=dump,
            MOSAIC_GPU_DUMP_PTX="1",
        )
        found = [_resources(path, folder) for path in sorted(Path(dump).glob("*.ptx"))]
    return Compiled(ended.returncode, ended.stdout + ended.stderr, tuple(found))


def run_python(
    arguments: Sequence[str], **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python so that it can compile for `described_devices`, and waits for it.

    A process of its own: a kernel with a wrong instruction aborts all of it.

    Args:
      arguments: of Python, such as ["-m", "module"].
      variables: of the environment.

    Raises:
      FileNotFoundError: there is no toolchain.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join([str(_existing_toolchain()), *sys.path]),
        **variables,
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _existing_toolchain() -> Path:
    folder = toolchain()
    if folder is None:
        raise FileNotFoundError(
            f"compiling for a GPU needs the CUDA packages: run `make .venv/cuda`, or "
            f"let {TOOLCHAIN_VARIABLE} name the folder that has them."
        )
    return folder


def _resources(ptx: Path, folder: Path) -> Resources:
    """Assembles a kernel as jax did, and reads what it takes."""
    cubin = ptx.with_suffix(".cubin")
    said = _run(folder, "ptxas", "-v", "-arch=sm_90a", str(ptx), "-o", str(cubin))
    sass = _run(folder, "nvdisasm", "-c", str(cubin))
    # The number in its name says when a file was written: it may differ from ptx's.
    name = ptx.stem.rpartition("_")[0]
    asked = sorted(ptx.parent.glob(f"{name}_*.resources.txt"))[0].read_text()
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return Resources(
        kernel=ptx.stem,
        registers=_number(r"Used (\d+) registers", said),
        spill_bytes=sum(map(int, spills)),
        stack_bytes=_number(r"(\d+) bytes stack frame", said),
        shared_bytes=_number(r"smem_scratch_bytes=(\d+)", asked),
        hgmma=len(re.findall(r"\b[HQI]GMMA\b", sass)),
        serialized_wgmma="instructions are serialized" in said,
    )


def _run(folder: Path, program: str, *arguments: str) -> str:
    path = next(iter(sorted(folder.glob(f"nvidia/*/bin/{program}"))), program)
    ended = subprocess.run(
        [str(path), *arguments], capture_output=True, text=True, check=True
    )
    return ended.stdout + ended.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def format_resources(rows: Sequence[tuple[Case, Resources]]) -> str:
    """Returns a Markdown table of kernels."""
    lines = [
        "| case | kernel | tile | registers | spills | shared | HGMMA | serialised |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, r in rows:
        lines.append(
            f"| {case.name} | {r.kernel} | {case.tile} | {r.registers} "
            f"| {r.spill_bytes} | {r.shared_bytes} | {r.hgmma} "
            f"| {'yes' if r.serialized_wgmma else 'no'} |"
        )
    return "\n".join(lines)

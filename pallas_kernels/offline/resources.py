# SPDX-License-Identifier: Apache-2.0
"""What the kernels of each case take on the chip: compiled offline, kept in a file.

    python -m pallas_kernels.offline.resources [operation ...] [--part NAME] [--tiles]

compiles the cases, for an H200 that need not be there, prints a table with the time
that bytes and FLOPs allow, and rewrites their entries in
`devices/nvidia_h200_resources.json`. `--tiles` compiles every tile that a search would
time, so that none is tried that spills. Tests hold the kernels against the file.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_kernels.case import OPERATIONS, Case, Search, find_cases
from pallas_kernels.mosaic import interpreter
from pallas_kernels.offline.compile import (
    Compiled,
    Resources,
    compile_in_subprocess,
    format_resources,
)
from pallas_kernels.tuning import DEVICES

FILE = DEVICES / "nvidia_h200_resources.json"
VERSION = ".".join(map(str, interpreter.JAX_VERSION))  # compilers come with jax
REGISTERS_SLACK = 8  # ptxas allots them in eights
SHARED_SLACK = 1024  # barriers and alignment
MOST_SHARED = 232448  # bytes a block of an H200 may have


@functools.cache
def recorded() -> dict[str, Any]:
    """Returns the file: by version of jax, operation and case."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def entry(operation: str, name: str) -> dict[str, Any]:
    """Returns what is on record of a case for this jax; {} if nothing is."""
    return recorded().get(VERSION, {}).get(operation, {}).get(name, {})


def faults(compiled: Compiled, *, needs_hgmma: bool) -> list[str]:
    """Returns what is wrong with any kernel, in words; [] if nothing is."""
    if compiled.status:
        last = compiled.output.strip().splitlines()[-1:]  # no frames, with their paths
        return [f"status {compiled.status}: {' '.join(last)}"]
    found = [] if compiled.kernels else ["no Mosaic kernel was compiled"]
    for kernel in compiled.kernels:
        wrong = {
            f"spills {kernel.spill_bytes} bytes": kernel.spill_bytes > 0,
            "serialises wgmma": kernel.serialized_wgmma,
            f"takes {kernel.shared_bytes} bytes of shared memory": (
                kernel.shared_bytes > MOST_SHARED
            ),
        }
        found += [f"{kernel.kernel} {what}" for what, is_so in wrong.items() if is_so]
    if needs_hgmma and not any(kernel.hgmma for kernel in compiled.kernels):
        found.append("no kernel uses the tensor cores")
    return found


def differences(
    compiled: Compiled, golden: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Returns where kernels differ from what is on record, in words."""
    found = []
    kernels = by_name(compiled.kernels)
    if set(kernels) != set(golden):
        return [f"kernels {sorted(kernels)} are on record as {sorted(golden)}"]
    for name, kernel in kernels.items():
        for field, slack in (
            ("registers", REGISTERS_SLACK),
            ("shared_bytes", SHARED_SLACK),
        ):
            now, before = getattr(kernel, field), golden[name][field]
            if abs(now - before) > slack:
                found.append(f"{name} has {now} {field}, on record as {before}")
    return found


def by_name(kernels: Sequence[Resources]) -> dict[str, Resources]:
    """Returns kernels by a name that does not tell in which order they compiled."""
    found: dict[str, Resources] = {}
    for kernel in sorted(kernels, key=lambda k: (k.registers, k.shared_bytes)):
        name = re.sub(r"_\d+$", "", kernel.kernel)
        alike = sum(re.sub(r" \d+$", "", other) == name for other in found)
        found[f"{name} {alike + 1}" if alike else name] = kernel
    return found


def reason_against(case: Case, search: Search, tile: Any) -> str:
    """Returns why a tile is not worth timing, or "": also if it was not compiled."""
    judged = entry(case.operation, case.name).get("tiles", {})
    return judged.get(search.kernel, {}).get(str(tile), "")


def compile_and_record(
    operations: Sequence[str], part: str, with_tiles: bool, jobs: int
) -> bool:
    """Compiles cases, prints their table and rewrites their entries.

    Returns:
      Whether all of them compiled without a fault.
    """
    cases = [case for name in operations for case in find_cases(name, part)]
    rows, good = [], True
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        compiled = pool.map(
            lambda case: compile_in_subprocess(case.operation, case.name), cases
        )
        for case, result in zip(cases, compiled, strict=True):
            rows += [(case, kernel) for kernel in result.kernels]
            found = faults(result, needs_hgmma=False)
            for what in found:
                good = False
                print(f"{case.operation} {case.name}: {what}", flush=True)
            new: dict[str, Any] = {
                "tile": str(case.tile),
                "predicted_us": round(1e6 * case.least_seconds(), 2),
                "kernels": {n: _facts(k) for n, k in by_name(result.kernels).items()},
            }
            if with_tiles and case.searches:
                new["tiles"] = _judge_tiles(case, pool)
            if not found:
                _rewrite(case, new)
    print(format_resources(rows))
    print(format_predictions(cases))
    return good


def _judge_tiles(
    case: Case, pool: concurrent.futures.Executor
) -> dict[str, dict[str, str]]:
    """Returns what is wrong with each tile of each kernel, "" if nothing is."""

    def judge(candidate):
        compiled = compile_in_subprocess(case.operation, case.name, candidate)
        return "; ".join(faults(compiled, needs_hgmma=False))[:200]

    found = {}
    for number, search in enumerate(case.searches):
        said = pool.map(judge, [(number, i) for i in range(len(search.tiles))])
        found[search.kernel] = dict(zip(map(str, search.tiles), said, strict=True))
    return found


def _facts(kernel: Resources) -> dict[str, Any]:
    facts = dataclasses.asdict(kernel)
    del facts["kernel"]
    return facts


def _rewrite(case: Case, new: Mapping[str, Any]) -> None:
    """Changes one entry of the file, which may have changed since it was read."""
    document = json.loads(FILE.read_text()) if FILE.exists() else {}
    of_operation = document.setdefault(VERSION, {}).setdefault(case.operation, {})
    old = of_operation.get(case.name, {})
    kept = {name: value for name, value in old.items() if name == "tiles"}
    of_operation[case.name] = {**kept, **new}
    part = FILE.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    part.replace(FILE)


def format_predictions(cases: Sequence[Case]) -> str:
    """Returns a Markdown table of the time no implementation can beat on an H200."""
    lines = [
        "| case | GFLOP | MB | at least, us | limited by |",
        "|---|---|---|---|---|",
    ]
    for case in cases:
        seconds = case.least_seconds()
        by_flops = case.least_seconds(bytes_per_s=float("inf")) == seconds
        lines.append(
            f"| {case.operation} {case.name} | {case.flops / 1e9:.1f} "
            f"| {case.num_bytes / 1e6:.1f} | {1e6 * seconds:.1f} "
            f"| {'arithmetic' if by_flops else 'memory'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.offline.resources")
    parser.add_argument("operations", nargs="*", default=list(OPERATIONS))
    parser.add_argument("--part", default="", help="of the names of cases")
    parser.add_argument("--tiles", action="store_true", help="every tile of a search")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--predict", action="store_true", help="compile nothing")
    asked = parser.parse_args(arguments)
    if asked.predict:
        named = [c for o in asked.operations for c in find_cases(o, asked.part)]
        print(format_predictions(named))
        return 0
    good = compile_and_record(asked.operations, asked.part, asked.tiles, asked.jobs)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

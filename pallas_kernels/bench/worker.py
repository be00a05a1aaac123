# SPDX-License-Identifier: Apache-2.0
"""Checks and times the cases of an operation, in a process that may crash or hang.

python -m pallas_kernels.bench.worker OPTIONS OPERATION FIRST STRIDE

Writes a line of JSON before and after each case. Several workers compile at the same
time; what touches the device holds a lock, so that nothing else runs on it meanwhile.
"""

import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pallas_kernels.bench.measure import measure
from pallas_kernels.bench.options import Options
from pallas_kernels.bench.record import read_events
from pallas_kernels.case import Case


def run_cases(options: Options, operation: str, first: int, stride: int) -> None:
    """Measures every stride-th case from the first on, and writes what it finds."""
    log = Path(options.folder) / f"{operation}-{first}.jsonl"
    begun = {event["name"] for event in read_events(log)}
    cases = [c for c in find_cases(operation, options.dry) if options.part in c.name]
    cases = one_of_each_kind(cases) if options.first else cases
    with log.open("a", buffering=1) as lines:
        for case in cases[first::stride]:
            if case.name in begun:
                continue
            if time.time() > options.until:
                print(json.dumps({"event": "late", "name": case.name}), file=lines)
                continue
            began = {"event": "began", "name": case.name, "at": time.time()}
            print(json.dumps(began), file=lines)

            def note(record, began=began):
                print(json.dumps({**record, **began}), file=lines)

            record = measure(case, options, note)
            print(json.dumps({"event": "done", **record}), file=lines)


def find_cases(operation: str, dry: bool) -> list[Case]:
    """Returns the cases of an operation, or the tiny ones of a dry run."""
    module = importlib.import_module(f"pallas_kernels.{operation}.cases")
    return module.tiny_cases() if dry else module.cases()


def one_of_each_kind(cases: Sequence[Case]) -> list[Case]:
    """Returns the cheapest case of each kind, by the words of a name that tell it."""
    found: dict[tuple, Case] = {}
    for case in sorted(cases, key=lambda case: case.least_seconds()):
        words = case.name.split("-")
        found.setdefault((words[0], "backward" in words, "fused" in words), case)
    return list(found.values())


def main(arguments: Sequence[str]) -> None:
    text, operation, first, stride = arguments
    run_cases(Options.loads(text), operation, int(first), int(stride))


if __name__ == "__main__":
    main(sys.argv[1:])

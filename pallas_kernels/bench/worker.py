# SPDX-License-Identifier: Apache-2.0
"""Checks and times cases, in a process that may crash or hang.

python -m pallas_kernels.bench.worker OPTIONS FIRST STRIDE

Writes a line of JSON at each stage of a case: it began, it waits for the device, it
holds it, it is done. Several workers compile at the same time; what is timed holds a
lock, so that nothing else runs meanwhile.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.bench.measure import DeviceLost, measure
from pallas_kernels.bench.options import Options
from pallas_kernels.bench.record import Record, read_events
from pallas_kernels.bench.supervisor import LOST
from pallas_kernels.case import Case, find_cases


def run_cases(options: Options, first: int, stride: int) -> None:
    """Measures every stride-th case from the first on, and writes what it finds."""
    log = Path(options.folder) / f"worker-{first}.jsonl"
    begun = {(e["operation"], e["name"]) for e in read_events(log) if "name" in e}
    with log.open("a", buffering=1) as lines:

        def write(event: str, **facts: Any) -> None:
            facts |= {"event": event, "at": time.time()}
            print(json.dumps(facts), file=lines)

        for case in in_order(options)[first::stride]:
            place = {"operation": case.operation, "name": case.name}
            if (case.operation, case.name) in begun:
                continue
            if time.time() > options.until:
                write("late", **place)
                continue
            write("began", **place)

            def note(event: str, found: Record, place=place) -> None:
                write(event, **found | place)

            try:
                write("done", **measure(case, options, note))
            except DeviceLost as lost:
                write("done", **lost.args[0])
                lines.close()
                os._exit(LOST)  # an orderly end would touch the device


def in_order(options: Options) -> list[Case]:
    """Returns the cases of a run: a cheap one of each kind, then the others.

    Operations take turns, so that a run that ends early has something of each.
    """
    parts = options.part.split(",")
    first, others = [], []
    for operation in options.operations:
        cases = find_cases(operation, tiny=options.dry)
        cases = [c for c in cases if any(part in c.name for part in parts)]
        cheap = one_of_each_kind(cases)
        first.append(cheap)
        others.append([case for case in cases if case not in cheap])
    return _take_turns(first) + _take_turns(others)


def _take_turns(lists: Sequence[Sequence[Case]]) -> list[Case]:
    turns = itertools.zip_longest(*lists)
    return [case for turn in turns for case in turn if case is not None]


def one_of_each_kind(cases: Sequence[Case]) -> list[Case]:
    """Returns the cheapest case of each kind, by the words of a name that tell it."""
    found: dict[tuple, Case] = {}
    for case in sorted(cases, key=lambda case: case.least_seconds()):
        words = case.name.split("-")
        kind = [
            word for word in words if word in ("backward", "fused", "layer", "both")
        ]
        kind += [word for word in words if word in ("h64", "h128", "h256")]
        found.setdefault((words[0], *kind), case)
    return list(found.values())


def main(arguments: Sequence[str]) -> None:
    text, first, stride = arguments
    run_cases(Options.loads(text), int(first), int(stride))


if __name__ == "__main__":
    main(sys.argv[1:])

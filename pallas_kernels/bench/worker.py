# SPDX-License-Identifier: Apache-2.0
"""Checks and times the cases of an operation, in a process that may crash or hang.

python -m pallas_kernels.bench.worker OPTIONS OPERATION FIRST STRIDE

Writes a line of JSON before and after each case. Several workers compile at the same
time; what touches the device holds a lock, so that nothing else runs on it meanwhile.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import mosaic
from pallas_kernels.bench import check, peers, search
from pallas_kernels.bench.ceilings import Ceilings
from pallas_kernels.bench.options import Options
from pallas_kernels.bench.record import Record, read_events
from pallas_kernels.bench.timing import Entrant, Timing, time_in_turns
from pallas_kernels.case import Case

# Inputs in turn, so that none is found in the cache: several times an H200's 60 MB.
ROTATED_BYTES = 240e6
MOST_INPUTS = 8
SHORT_S = 100e-6  # below this, several calls make one program: launches take time too
Inputs = list[tuple[jax.Array, ...]]


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
            record = measure(case, options)
            print(json.dumps({"event": "done", **record}), file=lines)


def find_cases(operation: str, dry: bool) -> list[Case]:
    """Returns the cases of an operation, or the tiny ones of a dry run."""
    module = importlib.import_module(f"pallas_kernels.{operation}.cases")
    return module.tiny_cases() if dry else module.cases()


def one_of_each_kind(cases: Sequence[Case]) -> list[Case]:
    """Returns the cheapest case of each first word of a name."""
    found: dict[str, Case] = {}
    for case in sorted(cases, key=lambda case: case.least_seconds()):
        found.setdefault(case.name.partition("-")[0], case)
    return list(found.values())


def measure(case: Case, options: Options) -> Record:
    """Returns what a case's implementations compute and how long they take."""
    failures: dict[str, str] = {}
    with mosaic.interpret() if options.dry else contextlib.nullcontext():
        num_inputs, calls = _rotation(case, most=2 if options.dry else MOST_INPUTS)
        compiled = {}
        if "mosaic" in case.functions:  # compiles on the CPU alone
            function = case.functions["mosaic"]
            _attempt(
                failures, compiled, "mosaic", lambda: _compile(case, function, calls)
            )
        with device_lock(options):
            keys = jax.random.split(jax.random.key(time.time_ns() % 2**31), num_inputs)
            make = jax.jit(case.make_inputs)
            inputs = [jax.block_until_ready(make(key)) for key in keys]
            for name, function in case.functions.items():
                if name != "mosaic":
                    _attempt(
                        *(failures, compiled, name),
                        lambda f=function: _compile(case, f, calls),
                    )
            found = _check(case, compiled, inputs, calls, failures)
            entrants = {
                name: _entrant(program, inputs, calls)
                for name, program in compiled.items()
            }
            if options.peers and not options.dry:
                _add_peers(case, inputs, calls, entrants, failures)
            timings = _time(entrants, options, failures)
        tiles = []
        if options.tune and case.search is not None:
            tiles = search.time_tiles(case, inputs, options, device_lock)
    record = _record(case, options, found, timings, failures, tiles, calls)
    return {**record, "scratch_bytes": _scratch_bytes(compiled, calls)}


@contextlib.contextmanager
def device_lock(options: Options) -> Iterator[None]:
    """Keeps the other workers of a run off the device; a killed holder frees it."""
    with (Path(options.folder) / "device.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _rotation(case: Case, most: int) -> tuple[int, int]:
    """Returns how many inputs to make, and how many calls are one program."""
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in case.inputs)
    num_inputs = min(max(math.ceil(ROTATED_BYTES / size), 1), most)
    return num_inputs, num_inputs if case.least_seconds() < SHORT_S else 1


def _compile(case: Case, function: Callable, calls: int) -> Any:
    """Returns a program of one call on inputs, or of several on a list of them."""
    if calls == 1:
        return jax.jit(function).lower(*case.inputs).compile()

    def several(inputs):
        return [function(*some) for some in inputs]

    return jax.jit(several).lower([case.inputs] * calls).compile()


def _entrant(program: Any, inputs: Inputs, calls: int) -> Entrant:
    if calls == 1:
        count = len(inputs)
        return Entrant(lambda i: program(*inputs[i % count]), jax.block_until_ready)
    return Entrant(lambda _: program(inputs[:calls]), jax.block_until_ready, calls)


def _check(case, compiled, inputs, calls, failures) -> dict[str, list[float]]:
    """Returns the errors of each implementation on the first inputs."""
    expected: dict[str, Any] = {}
    _attempt(
        *(failures, expected, "reference"),
        lambda: check.reference_outputs(case, inputs[0]),
    )
    found: dict[str, list[float]] = {}
    for name, program in compiled.items():

        def first(program=program):
            run = _entrant(program, inputs, calls).run
            outputs = check.poisoned(lambda: run(0), calls * case.num_bytes)
            return check.errors(
                outputs if calls == 1 else outputs[0], expected["reference"]
            )

        if expected:
            _attempt(failures, found, name, first)
    return found


def _add_peers(case, inputs, calls, entrants, failures) -> None:
    for name, function in peers.jax_peers(case).items():
        _attempt(
            *(failures, entrants, name),
            lambda f=function: _entrant(_compile(case, f, calls), inputs, calls),
        )
    for name, make in peers.torch_peers(case, inputs).items():
        _attempt(failures, entrants, name, make)


def _time(entrants, options, failures) -> dict[str, Timing]:
    """Times in turns those that run at all."""
    able: dict[str, Entrant] = {}
    for name, entrant in entrants.items():

        def warm(entrant=entrant):
            entrant.wait(entrant.run(0))
            return entrant

        _attempt(failures, able, name, warm)
    rounds = 1 if options.dry else options.rounds
    until = time.perf_counter() + options.case_seconds
    least = 1e-4 if options.dry else 0.02
    return time_in_turns(able, rounds=rounds, until=until, measurement_s=least)


def _attempt(failures: dict[str, str], found: dict, name: str, make: Callable):
    """Puts make() into found, or what it raised into failures: others still run."""
    try:
        found[name] = make()
    except Exception as error:
        failures[name] = f"{type(error).__name__}: {error}".split("\n")[0][:300]


def _record(case, options, found, timings, failures, tiles, calls) -> Record:
    ceilings = Ceilings(
        **json.loads((Path(options.folder) / "ceilings.json").read_text())
    )
    ours = timings.get("mosaic")
    return {
        "operation": case.operation,
        "name": case.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dry": options.dry,
        "inputs": [f"{x.dtype}{list(x.shape)}" for x in case.inputs],
        "tile": _fields(case.tile),
        "flops": case.flops,
        "num_bytes": case.num_bytes,
        "calls_a_program": calls,
        "predicted_us": 1e6 * case.least_seconds(),
        "least_us": 1e6
        * case.least_seconds(ceilings.flops_per_s, ceilings.bytes_per_s),
        "share": ours and ceilings.share(case.flops, case.num_bytes, ours.median_s),
        "launch_bound": bool(
            ours and calls * ours.median_s < 2 * ceilings.launch_s and not options.dry
        ),
        "errors": found,
        "verdict": check.verdict(case, found),
        "timings": {
            name: {
                "median_us": 1e6 * t.median_s,
                "low_us": 1e6 * t.low_s,
                "high_us": 1e6 * t.high_s,
                "rounds": t.rounds,
            }
            for name, t in timings.items()
        },
        "failures": failures,
        "tiles": tiles,
        "search": case.search
        and {"kernel": case.search.kernel, "call": dict(case.search.call)},
    }


def _scratch_bytes(compiled: dict[str, Any], calls: int) -> dict[str, int]:
    """Returns what each program needs besides its inputs and outputs, if it says so.

    Of several calls in one program, which may share it: only one call's is told.
    """
    found = {name: program.memory_analysis() for name, program in compiled.items()}
    return {
        name: said.temp_size_in_bytes
        for name, said in found.items()
        if said is not None and calls == 1
    }


def _fields(tile: Any) -> Any:
    if dataclasses.is_dataclass(tile) and not isinstance(tile, type):
        return dataclasses.asdict(tile)
    return str(tile)


def main(arguments: Sequence[str]) -> None:
    text, operation, first, stride = arguments
    run_cases(Options.loads(text), operation, int(first), int(stride))


if __name__ == "__main__":
    main(sys.argv[1:])

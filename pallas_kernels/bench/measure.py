# SPDX-License-Identifier: Apache-2.0
"""Checks one case, then times its implementations and those of other libraries."""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import mosaic
from pallas_kernels.bench import check, peers, search
from pallas_kernels.bench.ceilings import Ceilings
from pallas_kernels.bench.options import Options
from pallas_kernels.bench.record import Record
from pallas_kernels.bench.timing import Entrant, Timing, time_in_turns
from pallas_kernels.case import Case

# Inputs in turn, so that none is found in the cache: several times an H200's 60 MB.
ROTATED_BYTES = 240e6
MOST_INPUTS = 8
SHORT_S = 100e-6  # below this, several calls make one program: launches take time too
Inputs = list[tuple[jax.Array, ...]]


def measure(
    case: Case, options: Options, note: Callable[[Record], None] = lambda record: None
) -> Record:
    """Returns what a case's implementations compute and how long they take.

    Args:
      case: the call.
      options: of the run.
      note: is given what is known of our own kernel before any other implementation
        runs, which may take long or end the process.
    """
    with mosaic.interpret() if options.dry else contextlib.nullcontext():
        work = _Work(case, options)
        work.compile("mosaic")  # on the CPU alone: other workers may use the device
        work.make_inputs()
        if options.peers and not options.dry:
            work.add_torch_peers()  # compiles on the CPU, most of the time
        with device_lock(options):
            work.check("mosaic")
            work.time(["mosaic"], rounds=3)
            note(work.record())
            for name in case.functions:
                if name != "mosaic":
                    work.compile(name)  # may try GEMMs on the device
                    work.check(name)
            if options.peers and not options.dry:
                work.add_jax_peers()
            work.time(list(work.entrants), rounds=options.rounds)
        if options.tune:
            work.search_tiles()
        return work.record()


class _Work:
    """A case being measured: its inputs and programs are on the device."""

    def __init__(self, case: Case, options: Options):
        self.case, self.options = case, options
        most = 2 if options.dry else MOST_INPUTS
        self.num_inputs, self.calls = _rotation(case, most)
        self.inputs: Inputs = []
        self.programs: dict[str, Any] = {}
        self.entrants: dict[str, Entrant] = {}
        self.expected: list[jax.Array] | None = None
        self.errors: dict[str, list[float]] = {}
        self.timings: dict[str, Timing] = {}
        self.searches: list[dict[str, Any]] = []
        self.failures: dict[str, str] = {}

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Notes what one implementation raises: others still run."""
        try:
            yield
        except Exception as error:
            said = f"{type(error).__name__}: {error}".split("\n")[0]
            self.failures.setdefault(name, said[:300])
            self.entrants.pop(name, None)

    def compile(self, name: str) -> None:
        with self.attempt(name):
            self.programs[name] = self._program(self.case.functions[name])

    def _program(self, function: Callable) -> Any:
        """Returns a program of one call on inputs, or of several on a list of them."""
        if self.calls == 1:
            return jax.jit(function).lower(*self.case.inputs).compile()

        def several(inputs):
            return [function(*some) for some in inputs]

        return jax.jit(several).lower([self.case.inputs] * self.calls).compile()

    def _entrant(self, program: Any) -> Entrant:
        inputs, calls = self.inputs, self.calls
        if calls == 1:
            return Entrant(
                lambda i: program(*inputs[i % len(inputs)]), jax.block_until_ready
            )
        return Entrant(lambda _: program(inputs[:calls]), jax.block_until_ready, calls)

    def make_inputs(self) -> None:
        keys = jax.random.split(jax.random.key(time.time_ns() % 2**31), self.num_inputs)
        make = jax.jit(self.case.make_inputs)
        self.inputs = [jax.block_until_ready(make(key)) for key in keys]

    def check(self, name: str) -> None:
        """Compares the first outputs with the reference, and makes an entrant."""
        if self.expected is None:
            with self.attempt("reference"):
                self.expected = check.reference_outputs(self.case, self.inputs[0])
        if name not in self.programs:
            return
        with self.attempt(name):
            entrant = self._entrant(self.programs[name])
            num_bytes = self.calls * self.case.num_bytes
            outputs = check.poisoned(lambda: entrant.run(0), num_bytes)
            if self.expected is not None:
                outputs = outputs if self.calls == 1 else outputs[0]
                self.errors[name] = check.errors(outputs, self.expected)
            self.entrants[name] = entrant

    def add_jax_peers(self) -> None:
        for name, function in peers.jax_peers(self.case).items():
            with self.attempt(name):
                self.add_warm(name, self._entrant(self._program(function)))

    def add_torch_peers(self) -> None:
        for name, make in peers.torch_peers(self.case, self.inputs).items():
            with self.attempt(name):
                self.add_warm(name, make())

    def add_warm(self, name: str, entrant: Entrant) -> None:
        entrant.wait(entrant.run(0))
        self.entrants[name] = entrant

    def time(self, names: list[str], rounds: int) -> None:
        entrants = {n: self.entrants[n] for n in names if n in self.entrants}
        dry = self.options.dry
        self.expected = None if rounds > 3 else self.expected  # frees its memory
        self.timings = time_in_turns(
            entrants,
            rounds=1 if dry else rounds,
            until=time.perf_counter() + self.options.case_seconds,
            measurement_s=1e-4 if dry else 0.02,
        )

    def search_tiles(self) -> None:
        for asked in self.case.searches:
            with self.attempt(f"tiles of {asked.kernel}"):
                rows = search.time_tiles(
                    *(self.case, asked, self.inputs, self.options),
                    *(device_lock, self.errors),
                )
                self.searches.append(
                    {
                        "kernel": asked.kernel,
                        "call": dict(asked.call),
                        "shipped": _fields(asked.shipped),
                        "tiles": rows,
                    }
                )

    def record(self) -> Record:
        folder = Path(self.options.folder)
        ceilings = Ceilings(**json.loads((folder / "ceilings.json").read_text()))
        case, ours = self.case, self.timings.get("mosaic")
        rates = (ceilings.flops_per_s, ceilings.bytes_per_s)
        short = ours and self.calls * ours.median_s < 2 * ceilings.launch_s
        return {
            "operation": case.operation,
            "name": case.name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "dry": self.options.dry,
            "inputs": [f"{x.dtype}{list(x.shape)}" for x in case.inputs],
            "tile": _fields(case.tile),
            "flops": case.flops,
            "num_bytes": case.num_bytes,
            "calls_a_program": self.calls,
            "predicted_us": 1e6 * case.least_seconds(),
            "least_us": 1e6 * case.least_seconds(*rates),
            "share": ours and ceilings.share(case.flops, case.num_bytes, ours.median_s),
            "launch_bound": bool(short and not self.options.dry),
            "errors": self.errors,
            "verdict": check.verdict(case, self.errors),
            "timings": {name: _microseconds(t) for name, t in self.timings.items()},
            "scratch_bytes": self._scratch_bytes(),
            "failures": self.failures,
            "searches": self.searches,
        }

    def _scratch_bytes(self) -> dict[str, int]:
        """Returns what each program needs besides its inputs and outputs.

        Several calls in one program share it, and tell nothing of one call.
        """
        said = {n: program.memory_analysis() for n, program in self.programs.items()}
        return {
            name: memory.temp_size_in_bytes
            for name, memory in said.items()
            if memory is not None and self.calls == 1
        }


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


def _microseconds(timing: Timing) -> dict[str, float]:
    return {
        "median_us": 1e6 * timing.median_s,
        "low_us": 1e6 * timing.low_s,
        "high_us": 1e6 * timing.high_s,
        "rounds": timing.rounds,
    }


def _fields(tile: Any) -> Any:
    if dataclasses.is_dataclass(tile) and not isinstance(tile, type):
        return dataclasses.asdict(tile)
    return str(tile)

# SPDX-License-Identifier: Apache-2.0
"""Checks one case, then times its implementations and those of other libraries."""

import contextlib
import dataclasses
import datetime
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import mosaic
from pallas_kernels.bench import check, peers, search
from pallas_kernels.bench.machine import Ceilings
from pallas_kernels.bench.options import Options
from pallas_kernels.bench.record import Record
from pallas_kernels.bench.timing import Entrant, Timing, device_lock, time_in_turns
from pallas_kernels.case import Case

# Inputs in turn, so that none is found in the cache: several times an H200's 60 MB.
ROTATED_BYTES = 240e6
MOST_INPUTS = 8
MOST_SPREAD = 0.1  # of the rounds of a time, relative to it, that is taken at once
SHORT_S = 500e-6  # shorter calls share a program: between programs a device idles
Inputs = list[tuple[jax.Array, ...]]
Note = Callable[[str, Record], None]


def measure(
    case: Case, options: Options, note: Note = lambda event, record: None
) -> Record:
    """Returns what a case's implementations compute and how long they take.

    Args:
      case: the call.
      options: of the run.
      note: is told that the case "waits" for the device and that it "holds" it, and
        what is known by then. Before any other implementation runs, which may take
        long or end the process, that is our own kernel's times.
    """
    with mosaic.interpret() if options.dry else contextlib.nullcontext():
        work = _Work(case, options, note)
        work.make_inputs()
        work.compile_reference()
        # On the CPU, but for XLA's trials of GEMMs: those want the device alone.
        for name in [name for name in case.functions if name not in case.gemms]:
            work.compile(name)
        if options.peers and not options.dry:
            work.add_jax_peers()
            work.add_torch_peers()
        with work.device():
            work.compile("mosaic")
            work.check("mosaic")
            work.time(["mosaic"], rounds=3)
            note("holds", work.record())
            for name in [name for name in case.functions if name != "mosaic"]:
                work.compile(name)
                work.check(name)
            work.warm_peers()
            work.time(list(work.entrants), rounds=options.rounds)
            if work.is_disturbed():
                work.time(list(work.entrants), rounds=options.rounds)
        if options.tune:
            work.search_tiles()
        return work.record()


class DeviceLost(Exception):
    """A kernel faulted; the one argument is what is known of its case."""


class _Work:
    """A case being measured: its inputs and programs are on the device."""

    def __init__(self, case: Case, options: Options, note: Note):
        self.case, self.options, self.note = case, options, note
        most = 2 if options.dry else MOST_INPUTS
        self.num_inputs, self.calls = _rotation(case, most)
        self.inputs: Inputs = []
        self.programs: dict[str, Any] = {}
        self.peers: dict[str, Callable[[], Entrant]] = {}
        self.entrants: dict[str, Entrant] = {}
        self.reference: Callable[..., list[jax.Array]] | None = None
        self.expected: list[jax.Array] | None = None
        self.errors: dict[str, list[float]] = {}
        self.timings: dict[str, Timing] = {}
        self.searches: list[dict[str, Any]] = []
        self.failures: dict[str, str] = {}

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Notes what one implementation raises: others still run.

        Raises:
          DeviceLost: after a fault nothing runs in this process any more.
        """
        try:
            yield
        except Exception as error:
            said = f"{type(error).__name__}: {error}".split("\n")[0]
            self.failures.setdefault(name, said[:300])
            self.entrants.pop(name, None)
            if re.search(r"CUDA_ERROR_(?!OUT_OF_MEMORY)|CUDA error:", str(error)):
                raise DeviceLost(self.record()) from error

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """Keeps the other workers off the device, and notes who has it."""
        self.note("waits", self.record())
        with device_lock(Path(self.options.folder)):
            self.note("holds", self.record())
            yield

    def compile_reference(self) -> None:
        with self.attempt("reference"):
            self.reference = check.compile_reference(self.case)

    def compile(self, name: str) -> None:
        if name not in self.programs:
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
        if self.expected is None and self.reference is not None:
            with self.attempt("reference"):
                self.expected = jax.block_until_ready(self.reference(*self.inputs[0]))
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
                program = self._program(function)
                self.peers[name] = lambda program=program: self._entrant(program)

    def add_torch_peers(self) -> None:
        """Runs each once, which compiles: on the CPU, most of the time."""
        for name, make in peers.torch_peers(self.case, self.inputs).items():
            with self.attempt(name):
                entrant = make()
                entrant.wait(entrant.run(0))
                self.peers[name] = lambda entrant=entrant: entrant

    def warm_peers(self) -> None:
        for name, make in self.peers.items():
            with self.attempt(name):
                entrant = make()
                entrant.wait(entrant.run(0))
                self.entrants[name] = entrant

    def time(self, names: list[str], rounds: int) -> None:
        """Times them in turns; of two times of ours, the one that varies less stays."""
        entrants = {n: self.entrants[n] for n in names if n in self.entrants}
        dry = self.options.dry
        self.expected = None if rounds > 3 else self.expected  # frees its memory
        timings = time_in_turns(
            entrants,
            rounds=1 if dry else rounds,
            until=time.perf_counter() + self.options.case_seconds,
            measurement_s=1e-4 if dry else 0.02,
        )
        old, new = (found.get("mosaic") for found in (self.timings, timings))
        if old is None or new is None or timings.keys() != self.timings.keys():
            better = True
        else:
            better = old.rounds < new.rounds or new.spread <= old.spread
        self.timings = timings if better else self.timings

    def is_disturbed(self) -> bool:
        """Whether our times vary as if another worker had used the device."""
        ours = self.timings.get("mosaic")
        dry = self.options.dry
        return ours is not None and not dry and ours.spread > MOST_SPREAD

    def search_tiles(self) -> None:
        for asked in self.case.searches:
            self.note("began", self.record())  # to compile, once more
            with self.attempt(f"tiles of {asked.kernel}"):
                rows = search.time_tiles(
                    self.case,
                    asked,
                    self.inputs,
                    self.options,
                    self.device,
                    self.errors,
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


def _rotation(case: Case, most: int) -> tuple[int, int]:
    """Returns how many inputs to make, and how many calls are one program."""
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in case.inputs)
    num_inputs, least_s = math.ceil(ROTATED_BYTES / size), case.least_seconds()
    if least_s < SHORT_S:
        num_inputs = max(num_inputs, math.ceil(SHORT_S / least_s))
    num_inputs = min(num_inputs, most)
    return num_inputs, num_inputs if least_s < SHORT_S else 1


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

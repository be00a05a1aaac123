# SPDX-License-Identifier: Apache-2.0
"""Interpret mode of Mosaic GPU, on the CPU: the one file that knows jax versions.

It finds races and reads of memory that nobody wrote. What it lacks is added here:
copies that add into global memory, and an error where a GPU would fault, at a copy that
begins where TMA cannot.
"""

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import config as _jax_config
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as _interpreter
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as _interpreter_memory
from jax.experimental.pallas import mosaic_gpu as plgpu

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])
TMA_ALIGNMENT = 128  # bytes, in shared memory


def is_interpreted() -> bool:
    """Returns whether kernels traced now run in interpret mode; see `interpret`."""
    return _jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


@contextlib.contextmanager
def interpret(detect_races: bool = True) -> Iterator[None]:
    """Runs kernels traced inside on the CPU, with memory and barriers simulated.

    Memory starts as NaN. `current_target()` is a Hopper GPU of two cores meanwhile.

    Raises:
      RuntimeError: two threads touched the same memory, unordered.
      ValueError: a copy begins inside shared memory where TMA cannot.
    """
    parameters = plgpu.InterpretGPUParams(detect_races=detect_races)
    try:
        with (
            plgpu.force_gpu_interpret_mode(parameters),
            _tolerant_barriers(),
            _adding_copies(),
            _aligned_copies(),
        ):
            yield
            # A call returns before its kernel has run: what it needs stays until then,
            # and only then are its races known.
            jax.effects_barrier()
        races = _interpreter._races
        if races is not None and races.races_found:
            raise RuntimeError("a kernel has a data race; see the log above")
    except BaseException:
        _interpreter.reset_gpu_interpret_mode_state()
        raise


@contextlib.contextmanager
def _tolerant_barriers() -> Iterator[None]:
    """Lets a kernel end with phases of a barrier that no thread waited for.

    jax 0.11 calls that an error; it is not, and 0.12 no longer says so.
    """
    if JAX_VERSION >= (0, 12):
        yield
        return
    barrier = _interpreter_memory.Barrier
    strict = barrier.deallocate

    def deallocate(self):
        with self.cv:
            # Each thread calls this at its end; until the last one the phases count.
            if self.ref_count == 1:
                self.last_observed_phase_by_thread.clear()
            strict(self)

    barrier.deallocate = deallocate
    try:
        yield
    finally:
        barrier.deallocate = strict


# Interpret mode runs a copy in the thread that asks for it. A compiled function may
# bring what it was traced with into a later context.
_COPYING = threading.local()


@contextlib.contextmanager
def _adding_copies() -> Iterator[None]:
    """Teaches interpret mode `copy_smem_to_gmem(reduction_op="add")`.

    The copy reads shared memory as any does, checked for races; additions are atomic,
    so they are not checked against each other.
    """
    plain: Any = _interpreter.copy_smem_to_gmem
    task = _interpreter.AsyncCopySmemToGmemTask

    class Task(task):
        def __call__(self, copier: int) -> None:
            if not _COPYING.adds:
                super().__call__(copier)
                return
            memory: Any = _interpreter._get_shared_memory()
            target = self.dst_allocation_key, self.dst_access
            self.pre_read(copier, memory)
            tile, total = (
                memory.get_buffer_content(
                    *place, self.thread, logging_info=self.logging_info
                )[0]
                for place in ((self.src_allocation_key, self.src_access), target)
            )
            if self.clock is not None:
                self.clock.inc(copier)
                self.write_clock = self.clock.copy()
            memory.store_buffer_content(
                *target, total + tile, self.thread, logging_info=self.logging_info
            )
            self.post_write(copier, memory)

    def copy(*, reduction_op: Any, **arguments: Any) -> Any:
        _COPYING.adds = reduction_op == "add"
        return plain(reduction_op=None if _COPYING.adds else reduction_op, **arguments)

    _interpreter.copy_smem_to_gmem = copy
    _interpreter.AsyncCopySmemToGmemTask = Task
    try:
        yield
    finally:
        _interpreter.copy_smem_to_gmem = plain
        _interpreter.AsyncCopySmemToGmemTask = task


@contextlib.contextmanager
def _aligned_copies() -> Iterator[None]:
    """Lets copies begin in shared memory only where those of a GPU can.

    Memory is seen in the order of its logical shape. A tile of 8 rows that is swizzled
    begins at a multiple of 128 bytes in that order too.
    """
    sides = {
        "AsyncCopySmemToGmemTask": "src",
        "AsyncCopyGmemToSmemTask": "dst",
    }
    plain = {name: getattr(_interpreter, name) for name in sides}

    def checked(task: Any, side: str) -> Any:
        class Task(task):
            def __init__(self, *arguments: Any, **named: Any):
                super().__init__(*arguments, **named)
                key = getattr(self, f"{side}_allocation_key")
                access = getattr(self, f"{side}_access")
                memory: Any = _interpreter._get_shared_memory()
                about = memory.buffer_shape_and_dtype(key)
                first = _first_byte(access.range, about.shape, about.dtype)
                if first % TMA_ALIGNMENT:
                    raise ValueError(
                        f"a copy begins {first} bytes inside a buffer {about.shape} in "
                        f"shared memory, at {access.range}; TMA takes multiples of "
                        f"{TMA_ALIGNMENT}."
                    )

        return Task

    for name, side in sides.items():
        setattr(_interpreter, name, checked(plain[name], side))
    try:
        yield
    finally:
        for name, task in plain.items():
            setattr(_interpreter, name, task)


def _first_byte(ranges: Any, shape: Any, dtype: Any) -> int:
    """Returns where the first element of an access lies, from its buffer's begin."""
    starts = [r if isinstance(r, int) else r.start or 0 for r in ranges]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    places = zip(starts, strides, strict=True)
    return sum(start * stride for start, stride in places) * dtype.itemsize

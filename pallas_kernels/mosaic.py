# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU as our kernels use it: the one file that knows jax versions.

Kernels take from here what interpret mode lacks (accumulators that start from a value,
a left operand in registers, adding into global memory) and what differs between
jax 0.11 and 0.12. All else they take from `plgpu` itself.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import config as _jax_config
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as _interpreter
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as _interpreter_memory
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])


def kernel(
    body: Callable[..., None], *, name: str, barriers: bool = True, **options: Any
) -> Callable:
    """Returns `plgpu.kernel(body)` with fast exp2 and tanh, under a name for profiles.

    Args:
      body: takes the refs of inputs, outputs and scratch.
      name: of the CUDA kernel.
      barriers: whether every store waits for the whole warpgroup first. A body needs
        it not if no thread reads what another one stored.
      options: `out_type`, `scratch_types`, `grid`, `grid_names`, `num_threads`, ... of
        `plgpu.kernel`.
    """
    return plgpu.kernel(
        body,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=not barriers,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=name,
        **options,
    )


class Zeros:
    """An accumulator of `accumulate` that starts from zero."""

    def __init__(self, rows: int, columns: int):
        self.shape = (rows, columns)


def accumulate(body: Callable[..., None], *starts: jax.Array | Zeros) -> Any:
    """Runs body on tensor-core accumulators and returns what they hold at its end.

    Every `wgmma` of one body is in flight at once; they are waited for at its end.

    Args:
      body: takes an accumulator for each start, for `wgmma`.
      starts: float32 in the WGMMA layout, or `Zeros`.
    """
    if is_interpreted():
        values = [
            jnp.zeros(s.shape, jnp.float32) if isinstance(s, Zeros) else s
            for s in starts
        ]
        ends = [_Accumulator(value) for value in values]
        body(*ends)
        ends = tuple(end.value for end in ends)
    elif len(starts) == 1 and isinstance(starts[0], Zeros):

        def run(accumulator):
            body(accumulator)
            return accumulator[...]

        return pl.run_scoped(run, plgpu.ACC(starts[0].shape, jnp.float32))
    else:
        refs = tuple(plgpu.ACC.init(_started(start)) for start in starts)
        ends = pl.run_state(lambda refs: body(*refs))(refs)
    return ends if len(starts) > 1 else ends[0]


def accumulate_loop(
    rows: int,
    columns: int,
    num_steps: jax.Array | int,
    body: Callable[[Any, jax.Array, Any], Any],
    carry: Any,
) -> tuple[jax.Array, Any]:
    """Runs body for each step on one tensor-core accumulator that starts from zero.

    A product may stay in flight from a step to the next: body waits with `wgmma_wait`.

    Args:
      rows: of the accumulator.
      columns: of the accumulator.
      num_steps: how often body runs, also 0.
      body: takes the accumulator, for `wgmma`, the step and the carry; returns a carry.
      carry: what the first step gets.

    Returns:
      What the accumulator holds, and the last carry.
    """
    if is_interpreted():

        def add(step, state):
            accumulator = _Accumulator(state[0])
            carry = body(accumulator, step, state[1])
            return accumulator.value, carry

        start = jnp.zeros((rows, columns), jnp.float32)
        return jax.lax.fori_loop(0, num_steps, add, (start, carry))

    def run(accumulator):
        def add(step, carry):
            return body(accumulator, step, carry)

        ended = jax.lax.fori_loop(0, num_steps, add, carry)
        return accumulator[...], ended

    return pl.run_scoped(run, plgpu.ACC((rows, columns), jnp.float32))


def wgmma(accumulator: Any, a: Any, b: Any) -> None:
    """Adds a @ b to an accumulator of `accumulate`; does not wait for it.

    Args:
      a: [m, k] bfloat16 or float16, in shared memory or in registers.
      b: [k, n], in shared memory; `ref.transpose((1, 0))` of an [n, k] ref is free.
    """
    if not isinstance(accumulator, _Accumulator):
        plgpu.wgmma(accumulator, a, b)
        return
    # Interpret mode knows no operand in registers, and its own wgmma takes no part in
    # the search for races: plain reads do. The fence orders them before a later TMA
    # write to the operands, as wgmma's own reads would be.
    a_value = a if isinstance(a, jax.Array) else a[...]
    b_value = b[...]
    plgpu.commit_smem()
    product = jnp.dot(a_value, b_value, preferred_element_type=jnp.float32)
    accumulator.value = accumulator.value + product


class _Accumulator:
    """Stands for an accumulator ref in interpret mode."""

    def __init__(self, value: jax.Array):
        self.value = value

    def __getitem__(self, _: Any) -> jax.Array:
        return self.value


def _started(start: jax.Array | Zeros) -> jax.Array:
    if isinstance(start, Zeros):
        start = jnp.zeros(start.shape, jnp.float32)
        return plgpu.layout_cast(start, plgpu.Layout.WGMMA)
    return start


def add_to_global(tile: Any, total: Any) -> None:
    """Adds a float32 tile of shared memory into global memory, without waiting.

    Blocks may add to one place, in any order: the last bits of the sum vary.
    `plgpu.wait_smem_to_gmem` waits for it as for a plain copy.
    """
    plgpu.copy_smem_to_gmem(tile, total, reduction_op="add")


def is_interpreted() -> bool:
    """Returns whether kernels traced now run in interpret mode; see `interpret`."""
    return _jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


@contextlib.contextmanager
def interpret(detect_races: bool = True) -> Iterator[None]:
    """Runs kernels traced inside on the CPU, with memory and barriers simulated.

    Memory starts as NaN. `current_target()` is a Hopper GPU of two cores meanwhile.

    Raises:
      RuntimeError: two threads touched the same memory, unordered.
    """
    parameters = plgpu.InterpretGPUParams(detect_races=detect_races)
    try:
        with (
            plgpu.force_gpu_interpret_mode(parameters),
            _tolerant_barriers(),
            _adding_copies(),
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

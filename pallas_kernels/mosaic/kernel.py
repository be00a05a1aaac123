# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU as our kernels use it, on a GPU and in interpret mode.

Kernels take from here what interpret mode lacks: accumulators that start from a value,
a left operand in registers, adding into global memory. All else they take from `plgpu`
itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.interpreter import is_interpreted


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
    call = plgpu.kernel(
        body,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=not barriers,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=name,
        **options,
    )

    def call_once(*operands: jax.Array) -> Any:
        # Where a loop stacks a result that something else reads too, XLA would run the
        # kernel twice: once fused with the writing into the stack, once for the reader.
        return jax.tree.map(jax.lax.optimization_barrier, call(*operands))

    return call_once


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

        def product(accumulator):
            body(accumulator)
            return accumulator[...]

        return pl.run_scoped(product, plgpu.ACC(starts[0].shape, jnp.float32))
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

    def products(accumulator):
        def add(step, carry):
            return body(accumulator, step, carry)

        ended = jax.lax.fori_loop(0, num_steps, add, carry)
        return accumulator[...], ended

    return pl.run_scoped(products, plgpu.ACC((rows, columns), jnp.float32))


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

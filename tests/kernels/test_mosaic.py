# SPDX-License-Identifier: Apache-2.0
"""Our helpers for Mosaic GPU, in interpret mode: products, starts and races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.case import draw_normal

M, K, N = 64, 64, 64
# Abstract in name only: jax itself makes them so.
SWIZZLED = (
    plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)


def product(a, b, *, start: float = 0.0, a_in_registers: bool = False, waits=True):
    """Returns a @ b + start, of one warpgroup."""

    def body(a_gmem, b_gmem, out_gmem, a_smem, b_smem, out_smem, barrier):
        plgpu.copy_gmem_to_smem(a_gmem, a_smem, barrier)
        plgpu.copy_gmem_to_smem(b_gmem, b_smem, barrier)
        if waits:
            plgpu.barrier_wait(barrier)
        left = a_smem
        if a_in_registers:
            left = plgpu.load(a_smem, layout=plgpu.Layout.WGMMA)
        begin = mosaic.Zeros(M, N)
        if start:
            begin = plgpu.layout_cast(
                jnp.full((M, N), start, jnp.float32), plgpu.Layout.WGMMA
            )
        sum_ = mosaic.accumulate(lambda acc: mosaic.wgmma(acc, left, b_smem), begin)
        out_smem[...] = sum_.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    return mosaic.kernel(
        body,
        name="product",
        out_type=jax.ShapeDtypeStruct((M, N), a.dtype),
        scratch_types=[
            plgpu.SMEM((M, K), a.dtype, transforms=SWIZZLED),
            plgpu.SMEM((K, N), a.dtype, transforms=SWIZZLED),
            plgpu.SMEM((M, N), a.dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=2),
        ],
    )(a, b)


@pytest.fixture
def operands(key):
    keys = jax.random.split(key)
    return [draw_normal(k, (64, 64), jnp.bfloat16) for k in keys]


def run(operands, **options):
    with mosaic.interpret():
        return jax.block_until_ready(
            jax.jit(lambda *x: product(*x, **options))(*operands)
        )


@pytest.mark.parametrize("a_in_registers", [False, True])
@pytest.mark.parametrize("start", [0.0, 3.0])
def test_an_accumulator_holds_its_start_and_the_product(
    operands, start, a_in_registers
):
    out = run(operands, start=start, a_in_registers=a_in_registers)
    a, b = (np.asarray(x, np.float64) for x in operands)
    expected = a @ b + start
    error = np.linalg.norm(np.asarray(out, np.float64) - expected)
    assert error < 2**-8 * np.linalg.norm(expected)


def test_a_missing_wait_is_found_as_a_race(operands):
    with pytest.raises(Exception, match=r"(?i)race"):
        run(operands, waits=False)


def test_after_a_race_the_next_kernel_runs(operands):
    with pytest.raises(Exception, match=r"(?i)race"):
        run(operands, waits=False)
    assert np.isfinite(np.asarray(run(operands), np.float32)).all()


def test_a_kernel_is_interpreted_inside_the_context_only():
    assert not mosaic.is_interpreted()
    with mosaic.interpret():
        assert mosaic.is_interpreted()
    assert not mosaic.is_interpreted()

# SPDX-License-Identifier: Apache-2.0
"""The calls at real shapes: what is counted, compared and searched."""

import jax
import numpy as np
import pytest

from pallas_kernels.attention import cases

CASES = {case.name: case for case in cases.cases()}


def test_every_case_has_its_own_name_and_the_kernel():
    assert len(CASES) == len(cases.cases())
    assert all("mosaic" in case.functions for case in CASES.values())


def test_only_products_in_sight_count():
    b, t, n, _, h = cases.MHA[128]
    causal = 4 * b * n * h * t * (t + 1) / 2
    assert CASES["forward-h128-causal-8k"].flops == causal
    assert CASES["forward-backward-h128-causal-8k"].flops == 3.5 * causal
    assert CASES["forward-h128-packed-8k"].flops < causal
    assert CASES["forward-h128-decode-8k"].flops == 4 * 64 * 32 * 128 * 8192


def test_every_kernel_of_a_call_that_is_searched_has_a_search():
    found = {
        (search.kernel, call["head_dim"], call["causal"])
        for case in CASES.values()
        for search in case.searches
        for call in [search.call]
    }
    kernels = ("forward", "backward_dq", "backward_dkv")
    shapes = [(h, causal) for h in (64, 128, 256) for causal in (True, False)]
    expected = {(f"attention_{k}", h, causal) for k in kernels for h, causal in shapes}
    assert found == expected | {
        ("attention_backward_fused", h, True) for h in (64, 128)
    }


@pytest.mark.parametrize("case", cases.tiny_cases(), ids=lambda case: case.name)
def test_the_reference_in_parts_is_the_whole(case):
    inputs = case.make_inputs(jax.random.key(0))
    assert [x.shape for x in inputs] == [x.shape for x in case.inputs]
    whole = jax.jit(case.functions["xla"])(*inputs)
    parts = jax.jit(case.reference)(*inputs)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert x.shape == y.shape
        wide = [np.asarray(z, np.float32) for z in (x, y)]
        np.testing.assert_allclose(wide[0], wide[1], rtol=1e-2)  # two bfloat16 steps

# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for an H200 on a machine without one, each in its own process.

What they take is held against `pallas_kernels/devices/nvidia_h200_resources.json`. A
difference is a regression, or an improvement: then rewrite the file as the message says
and put the new figures in the commit. Cases with `in_ci=False` are compiled by
`python -m pallas_kernels.offline.resources` only.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import pytest

import pallas_kernels
from pallas_kernels import offline
from pallas_kernels.case import OPERATIONS, find_cases
from pallas_kernels.offline import Compiled, Resources, resources

needs_toolchain = pytest.mark.skipif(
    offline.toolchain() is None,
    reason=f"run `make .venv/cuda`, or set {offline.TOOLCHAIN_VARIABLE}: there are no "
    "CUDA packages to compile with",
)
WITH_TENSOR_CORES = ("attention", "grouped_matmul")
# By version of jax. Its two other tiles do not compile at all there.
KNOWN_FAULTS = {
    ("0.11", "forward-backward-h64-causal-8k-fused"): [
        "attention_backward_fused_1 spills 8 bytes"
    ]
}


def cases_of(operation: str) -> list[str]:
    if not (Path(pallas_kernels.__file__).parent / operation).is_dir():
        return []  # a test below says so
    return [case.name for case in find_cases(operation) if case.in_ci]


CASES = [(operation, name) for operation in OPERATIONS for name in cases_of(operation)]


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "name"), CASES)
def test_a_kernel_compiles_for_an_h200_and_takes_what_is_on_record(
    operation, name, run_offline, monkeypatch
):
    monkeypatch.setattr("pallas_kernels.offline.compile.run_python", run_offline)
    compiled = offline.compile_in_subprocess(operation, name)
    needs_hgmma = operation in WITH_TENSOR_CORES
    known = KNOWN_FAULTS.get((resources.VERSION, name), [])
    assert resources.faults(compiled, needs_hgmma=needs_hgmma) == known
    if known or resources.VERSION not in resources.recorded():
        return  # what a compiler of another version takes is not on record
    golden = resources.entry(operation, name).get("kernels", {})
    rewrite = f"python -m pallas_kernels.offline.resources {operation} --part {name}"
    assert resources.differences(compiled, golden) == [], f"if intended: {rewrite}"


def test_every_operation_has_cases_with_work_to_do():
    for operation in OPERATIONS:
        cases = find_cases(operation)
        assert len({case.name for case in cases}) == len(cases) > 0
        for case in cases:
            assert case.operation == operation
            assert {"mosaic", "xla"} <= set(case.functions) or case.reference
            assert 0 < case.least_seconds() < 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_inputs_of_a_case_are_of_the_shapes_it_compiles_for(operation):
    key = jax.eval_shape(lambda: jax.random.key(0))
    for case in find_cases(operation):
        made = jax.eval_shape(case.make_inputs, key)
        assert [(x.shape, x.dtype) for x in made] == [
            (x.shape, x.dtype) for x in case.inputs
        ], case.name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_search_has_the_shipped_tile_among_its_tiles(operation):
    for case in find_cases(operation):
        for search in case.searches:
            assert search.shipped in search.tiles, (case.name, search.kernel)
            assert len(set(search.tiles)) == len(search.tiles)


FINE = Resources("a_0", 168, 0, 0, 200_000, 8, False)


def faults(**changes) -> list[str]:
    kernel = dataclasses.replace(FINE, **changes)
    return resources.faults(Compiled(0, "", (kernel,)), needs_hgmma=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(spill_bytes=8), "spills 8 bytes"),
        (dict(serialized_wgmma=True), "serialises wgmma"),
        (dict(shared_bytes=240_000), "240000 bytes of shared memory"),
        (dict(hgmma=0), "tensor cores"),
    ],
)
def test_a_fault_of_a_kernel_is_named(changes, said):
    assert faults() == []
    (fault,) = faults(**changes)
    assert said in fault


def test_a_failed_compilation_is_a_fault_with_its_last_words():
    (fault,) = resources.faults(Compiled(-6, "LLVM ERROR", ()), needs_hgmma=False)
    assert "-6" in fault and "LLVM ERROR" in fault


def test_a_program_without_a_kernel_is_a_fault():
    assert resources.faults(Compiled(0, "", ()), needs_hgmma=False)


def test_kernels_are_told_apart_whatever_order_they_compile_in():
    b = dataclasses.replace(FINE, kernel="b_1")
    more = dataclasses.replace(FINE, kernel="a_2", registers=200)
    first = resources.by_name((FINE, b, more))
    again = (
        dataclasses.replace(more, kernel="a_0"),
        dataclasses.replace(FINE, kernel="a_1"),
    )
    second = resources.by_name((*again, dataclasses.replace(b, kernel="b_2")))
    assert {n: k.registers for n, k in first.items()} == {
        "a": 168,
        "b": 168,
        "a 2": 200,
    }
    assert {n: k.registers for n, k in second.items()} == {
        "a": 168,
        "b": 168,
        "a 2": 200,
    }


def test_more_registers_than_on_record_are_a_difference():
    golden = {"a": dict(registers=168, shared_bytes=200_000)}
    compare = functools.partial(resources.differences, golden=golden)
    assert compare(Compiled(0, "", (FINE,))) == []
    more = dataclasses.replace(FINE, registers=184)
    assert compare(Compiled(0, "", (more,))) == [
        "a has 184 registers, on record as 168"
    ]
    other = dataclasses.replace(FINE, kernel="b_0")
    assert "on record as ['a']" in compare(Compiled(0, "", (other,)))[0]


@pytest.mark.slow
@needs_toolchain
def test_a_wrong_instruction_ends_its_own_process_only():
    compiled = offline.compile_in_subprocess("attention", "no such case")
    assert compiled.status != 0 and "StopIteration" in compiled.output

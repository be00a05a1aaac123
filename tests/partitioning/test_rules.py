# SPDX-License-Identifier: Apache-2.0
"""Letters become partition specs by tables."""

import jax
import pytest

from sharding import (
    AXES,
    COMPUTE,
    LETTERS,
    RESIDUAL,
    STORAGE,
    ShardingError,
    abstract_mesh,
    named_sharding,
    spec,
)

MESH = abstract_mesh(dict(data=2, fsdp=4, tensor=2))
EXPERTS = abstract_mesh(dict(fsdp=4, expert=2))


@pytest.mark.parametrize(
    ("letters", "compute", "storage"),
    [
        ("BTD", jax.P(("data", "fsdp"), None, None), jax.P(None, None, "fsdp")),
        ("DNH", jax.P(None, "tensor", None), jax.P("fsdp", "tensor", None)),
        ("VD", jax.P("tensor", None), jax.P("tensor", "fsdp")),
        ("LFD", jax.P(None, "tensor", None), jax.P(None, "tensor", "fsdp")),
        ("", jax.P(), jax.P()),
    ],
)
def test_compute_gathers_what_storage_cuts_by_model_width(letters, compute, storage):
    assert spec(letters, COMPUTE, MESH) == compute
    assert spec(letters, STORAGE, MESH) == storage


@pytest.mark.parametrize(
    ("letters", "compute", "storage"),
    [
        ("BT", jax.P(("fsdp", "expert"), None), jax.P(None, None)),
        ("DF", jax.P(None, None), jax.P(("fsdp", "expert"), None)),
        (
            "LEDF",
            jax.P(None, "expert", None, None),
            jax.P(None, "expert", "fsdp", None),
        ),
        ("EFD", jax.P("expert", None, None), jax.P("expert", None, "fsdp")),
    ],
)
def test_the_width_leaves_the_expert_axis_to_experts(letters, compute, storage):
    assert spec(letters, COMPUTE, EXPERTS) == compute
    assert spec(letters, STORAGE, EXPERTS) == storage


@pytest.mark.parametrize(
    ("sizes", "residual"),
    [
        (dict(data=4), jax.P("data", None, None)),
        (dict(fsdp=2, tensor=4), jax.P("fsdp", "tensor", None)),
        (dict(context=2, tensor=4), jax.P(None, ("context", "tensor"), None)),
    ],
)
def test_the_residual_stream_is_cut_by_every_axis_that_cuts_activations(
    sizes, residual
):
    assert spec("BTD", RESIDUAL, abstract_mesh(sizes)) == residual


def test_axes_of_size_1_vanish():
    assert spec("BTD", COMPUTE, abstract_mesh(dict(data=4))) == jax.P(
        "data", None, None
    )
    one = abstract_mesh({})
    for letter in LETTERS:
        assert spec(letter, COMPUTE, one) == spec(letter, STORAGE, one) == jax.P(None)


def test_an_unknown_letter_is_refused_with_the_alphabet():
    with pytest.raises(ShardingError) as error:
        spec("DXH", STORAGE, MESH)
    text = str(error.value)
    assert "'X' of 'DXH'" in text
    assert "".join(LETTERS) in text


@pytest.mark.parametrize(
    ("letters", "axis", "first", "second"),
    [("DNK", "tensor", "N", "K"), ("VF", "tensor", "V", "F"), ("DD", "fsdp", "D", "D")],
)
def test_one_mesh_axis_cuts_one_dim_only(letters, axis, first, second):
    with pytest.raises(ShardingError) as error:
        spec(letters, STORAGE, MESH)
    text = str(error.value)
    assert f"mesh axis {axis}" in text
    assert repr(letters) in text
    assert f"by '{first}' and '{second}'" in text


def test_a_shared_axis_of_size_1_is_no_conflict():
    assert spec("NF", STORAGE, abstract_mesh(dict(fsdp=8))) == jax.P(None, None)


@pytest.mark.parametrize("table", [COMPUTE, STORAGE])
def test_the_tables_use_known_letters_and_axes_only(table):
    assert set(table) <= set(LETTERS)
    assert {axis for axes in table.values() for axis in axes} <= set(AXES)


def test_letters_are_single_capitals_with_a_meaning():
    for letter, meaning in LETTERS.items():
        assert len(letter) == 1
        assert letter.isupper()
        assert meaning


def test_a_named_sharding_is_the_spec_on_its_mesh():
    placed = named_sharding("BT", COMPUTE, MESH)
    assert placed == jax.NamedSharding(MESH, jax.P(("data", "fsdp"), None))

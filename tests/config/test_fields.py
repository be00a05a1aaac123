# SPDX-License-Identifier: Apache-2.0
"""The settings as data: text read by type, and what the table says of them."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config.fields import (
    convert,
    read_text,
    setting_types,
    settings,
    type_problems,
)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "1e6", 1_000_000),
        ("steps", "1_000_000", 1_000_000),
        ("steps", " 7 ", 7),
        ("mesh.fsdp", "-1", -1),
        ("optimizer.lr", "3", 3.0),
        ("optimizer.clip_norm", "none", None),
        ("optimizer.clip_norm", "Null", None),
        ("optimizer.clip_norm", "0.5", 0.5),
        ("logging.wandb_project", "none", None),
        ("logging.wandb_project", "mine", "mine"),
        ("model.qk_norm", "true", True),
        ("model.qk_norm", "False", False),
        ("model.qk_norm", "1", True),
        ("model.mlp", "geglu", "geglu"),
        ("model.windows", "(1, 2)", (1, 2)),
        ("model.windows", "[1,2,]", (1, 2)),
        ("model.windows", "3", (3,)),
        ("data.weights", "0.9,0.1", (0.9, 0.1)),
        ("data.weights", "", ()),
        ("data.weights", "()", ()),
        ("data.paths", "x,y/z.bin", ("x", "y/z.bin")),
        ("data.paths", "('x', 'y')", ("x", "y")),
    ],
)
def test_text_is_read_by_the_type_of_its_setting(name, text, value):
    read = read_text(text, setting_types()[name])
    assert read == value
    assert type(read) is type(value)


@given(st.integers())
def test_the_text_of_any_integer_is_read(value):
    assert read_text(str(value), int) == value
    assert read_text(f"{value:_}", int) == value


@given(st.floats(allow_nan=False))
def test_the_text_of_any_float_is_read(value):
    assert read_text(repr(value), float) == value


@given(st.text())
def test_any_text_is_read_or_is_a_problem_but_never_a_crash(text):
    for kind in (int, float, bool, str, int | None, tuple[int, ...], Literal["a", "b"]):
        value = convert(read_text(text, kind), kind)
        assert len(type_problems(value, kind, "config.x")) <= 1


def test_settings_are_listed_with_type_default_and_comment():
    found = {setting.name.removeprefix("config."): setting for setting in settings()}
    assert list(found) == list(setting_types())
    assert (found["optimizer.lr"].type, found["optimizer.lr"].default) == (
        "float",
        None,
    )
    assert found["model.norm"].type == '"rmsnorm" | "layernorm"'
    assert found["model.norm_eps"].default == "1e-6"
    assert found["model.windows"].type == "tuple[int, ...]"
    assert found["optimizer.lr"].doc == "peak learning rate"


def test_every_setting_has_a_comment_that_stands_alone():
    for setting in settings():
        first = setting.doc.split()[0].lower()
        assert first not in {"of", "or", "with", "what", "times", "that"}, setting.name

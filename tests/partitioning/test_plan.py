# SPDX-License-Identifier: Apache-2.0
"""Every check of a plan, in one error, on shapes alone."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import sharding
from jaxllm.config import OptimizerConfig, presets
from jaxllm.models import Model
from jaxllm.step.optimizer import make_optimizer
from sharding import ShardingError, abstract_mesh, plan

SHAPES = {
    "embedding": ("VD", (512, 64)),
    "block/query": ("LDNH", (2, 64, 8, 8)),
    "block/down": ("LFD", (2, 256, 64)),
    "block/scale": ("LD", (2, 64)),
    "head_scale": ("H", (8,)),
}
MESH = abstract_mesh(dict(data=2, fsdp=4, tensor=2))
NARROW = {**sharding.STORAGE, "D": ("fsdp",)}  # leaves `expert` to experts, if any
MIB = 2**20


def make_plan(mesh=MESH, shapes=SHAPES, **options) -> sharding.Plan:
    letters = {path: axes for path, (axes, _) in shapes.items() if axes is not None}
    return plan(tree(shapes), letters, mesh, **options)


def tree(shapes) -> dict:
    root: dict = {}
    for path, (_, shape) in shapes.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return root


def problems(**options) -> list[str]:
    """Returns the lines of the one error that make_plan raises."""
    with pytest.raises(ShardingError) as error:
        make_plan(**options)
    first, *lines = str(error.value).split("\n")
    assert "do not fit together" in first
    assert all(line.startswith("  - ") for line in lines)
    return [line[4:] for line in lines]


def test_a_plan_places_each_parameter_by_its_letters_in_storage():
    rows = {row.path: row for row in make_plan().rows}
    assert rows["block/query"].spec == jax.P(None, "fsdp", "tensor", None)
    assert rows["block/down"].spec == jax.P(None, "tensor", "fsdp")
    assert rows["head_scale"].spec == jax.P(None)
    assert rows["block/query"].total_bytes == 4 * 2 * 64 * 8 * 8
    assert rows["block/query"].device_bytes == rows["block/query"].total_bytes // 8
    assert {row.rule for row in rows.values()} == {"letters"}


def test_an_indivisible_dim_names_the_sizes_that_work():
    shapes = {**SHAPES, "block/query": ("LDNH", (2, 64, 7, 8))}
    (text,) = problems(shapes=shapes)
    assert "block/query LDNH=(2, 64, 7, 8): N (query heads) = 7" in text
    assert "tensor=2" in text
    assert "N=6 or 8" in text
    assert "tensor one of [1]" in text


def test_a_dim_below_its_axis_names_the_axis_sizes_that_work():
    shapes = {**SHAPES, "block/query": ("LDNH", (2, 64, 4, 8))}
    (text,) = problems(shapes=shapes, mesh=abstract_mesh(dict(tensor=8)))
    assert "use N=8, or tensor one of [1, 2, 4]" in text


def test_an_indivisible_batch_names_its_setting_and_both_axes():
    (text,) = problems(dims={"B": ("config.data.batch_size", 100)})
    assert text.startswith("config.data.batch_size=100: B (batch rows) = 100")
    assert "data=2 * fsdp=4" in text
    assert "B=96 or 104" in text


def test_rows_that_the_residual_stream_cannot_cut_are_a_problem():
    mesh = abstract_mesh(dict(context=2, tensor=4))
    dims = {"T": ("config.data.sequence_length", 36)}
    (text,) = problems(mesh=mesh, dims=dims)
    assert text.startswith("config.data.sequence_length=36: T (query positions) = 36")
    assert "mesh context=2 * tensor=4; use T=32 or 40" in text


def test_an_unknown_letter_is_a_problem():
    (text,) = problems(shapes={**SHAPES, "odd": ("DX", (64, 3))})
    assert text.startswith("odd: letter 'X'")


def test_letters_that_do_not_fit_the_rank_are_a_problem():
    (text,) = problems(shapes={**SHAPES, "odd": ("DNH", (64, 8))})
    assert "odd has 2 dims (64, 8) but letters 'DNH'" in text


def test_a_parameter_without_letters_is_a_problem():
    (text,) = problems(shapes={**SHAPES, "odd": (None, (3,))})
    assert "odd (3,) has no letters" in text


def test_a_mesh_axis_used_twice_is_a_problem():
    (text,) = problems(shapes={**SHAPES, "odd": ("NF", (8, 64))})
    assert text.startswith("odd: mesh axis tensor is used twice in 'NF'")


def test_a_large_parameter_left_whole_is_a_problem():
    (text,) = problems(shapes={**SHAPES, "odd": ("HH", (512, 512))})
    assert "odd HH=(512, 512) would be whole on every device (1.0 MiB)" in text
    assert "['fsdp', 'tensor']" in text


@pytest.mark.parametrize("shape", [(512, 511), (1023, 1025)])
def test_a_small_or_indivisible_parameter_may_stay_whole(shape):
    rows = make_plan(shapes={**SHAPES, "odd": ("HH", shape)}).rows
    assert rows[-1].device_bytes == rows[-1].total_bytes == 4 * math.prod(shape)
    assert (rows[-1].total_bytes < MIB) == (shape == (512, 511))


def test_a_mesh_axis_that_cuts_no_parameter_is_a_problem():
    (text,) = problems(mesh=abstract_mesh(dict(fsdp=4, expert=2)), table=NARROW)
    assert text == "mesh axis expert=2 cuts no parameter; use expert=1."


def test_data_and_context_axes_need_not_cut_a_parameter():
    make_plan(mesh=abstract_mesh(dict(data=4, context=2)))


def test_all_problems_come_in_one_error():
    shapes = {
        **SHAPES,
        "twice": ("DD", (64, 64)),
        "seven": ("DN", (64, 7)),
        "rank": ("D", (64, 64)),
        "whole": ("HH", (1024, 1024)),
        "bare": (None, (2,)),
    }
    texts = problems(
        shapes=shapes,
        mesh=abstract_mesh(dict(fsdp=4, tensor=2, expert=2)),
        table=NARROW,
        overrides={"nothing/.*": jax.P()},
        dims={"B": ("config.data.batch_size", 6)},
    )
    words = (
        "twice",
        "seven",
        "rank",
        "whole",
        "bare",
        "batch_size",
        "nothing",
        "axis expert",
    )
    for word in words:
        assert sum(word in text for text in texts) == 1, word
    assert len(texts) == len(words)


def test_the_first_override_that_matches_a_whole_path_wins():
    overrides = {
        "block/.*": jax.P(None, "tensor"),
        "block/query": jax.P(),
        "bed": jax.P(),
    }
    texts = problems(overrides=overrides)
    assert [re.findall("override '(.*)' matches no", text) for text in texts] == [
        ["block/query"],
        ["bed"],
    ]
    del overrides["block/query"], overrides["bed"]
    rows = {row.path: row for row in make_plan(overrides=overrides).rows}
    assert rows["block/query"].spec == jax.P(None, "tensor")
    assert rows["block/query"].rule == "block/.*"
    assert rows["embedding"].rule == "letters"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (jax.P("fsdp", None, "tensor"), "has more entries than dims (512, 64)"),
        (jax.P("model"), "unknown mesh axes ['model']"),
    ],
)
def test_an_override_is_checked_against_shape_and_mesh(override, words):
    (text,) = problems(overrides={"embedding": override})
    assert text.startswith("embedding: ")
    assert words in text


def test_an_override_may_put_several_axes_on_a_dim():
    override = jax.P(None, ("fsdp", "tensor", "data", "stage"))
    rows = {row.path: row for row in make_plan(overrides={"embedding": override}).rows}
    assert rows["embedding"].device_bytes == rows["embedding"].total_bytes // 16


def test_an_override_that_does_not_divide_or_uses_an_axis_twice_is_a_problem():
    shapes = {**SHAPES, "embedding": ("VD", (511, 64))}
    texts = problems(shapes=shapes, overrides={"embedding": jax.P("fsdp", "fsdp")})
    assert len(texts) == 2
    assert "does not divide (511, 64)" in texts[0]
    assert "uses a mesh axis twice" in texts[1]


def test_an_override_may_leave_a_large_parameter_whole():
    shapes = {**SHAPES, "whole": ("HH", (1024, 1024))}
    made = make_plan(shapes=shapes, overrides={"whole": jax.P()})
    assert made.rows[-1].device_bytes == 4 * MIB


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion", "sgd"])
def test_optimizer_moments_lie_as_their_parameters_do(name):
    model = Model(presets.tiny_1m())
    made = plan(model.abstract, model.letters, MESH)
    rows = {row.path: row for row in made.rows}
    axes = jax.tree.map_with_path(lambda p, _: rows[_text(p)].letters, model.abstract)
    config = OptimizerConfig(name=name, lr=1e-3)
    state = jax.eval_shape(make_optimizer(config, 10, axes).init, model.abstract)
    placed = jax.tree.leaves(made.shardings(state))
    seen = set()
    for (path, leaf), place in zip(
        jax.tree.leaves_with_path(state), placed, strict=True
    ):
        owner = next((p for p in rows if _text(path).endswith(p)), None)
        if owner is None:
            assert place.spec == jax.P()
            assert math.prod(leaf.shape) * leaf.dtype.itemsize < MIB
            continue
        row = rows[owner]
        kept = zip(row.spec, leaf.shape, row.shape, strict=True)
        # Adafactor's are averages over some dims, which have size 1.
        spec = [axis if size == full else None for axis, size, full in kept]
        assert place.spec == jax.P(*spec), _text(path)
        seen.add(owner)
    assert seen == set(rows)


def _text(path) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def test_gradients_and_unknown_leaves_are_placed_too():
    made = make_plan()
    gradients = made.shardings(tree(SHAPES))
    assert gradients["block"]["down"].spec == jax.P(None, "tensor", "fsdp")
    other = {"count": jax.ShapeDtypeStruct((), jnp.int32), "embedding": None}
    assert made.shardings(other)["count"].spec == jax.P()
    # The name of a parameter with another shape is not that parameter.
    row = {"block": {"down": jax.ShapeDtypeStruct((256,), jnp.float32)}}
    assert made.shardings(row)["block"]["down"].spec == jax.P()
    assert optax.EmptyState() == made.shardings(optax.EmptyState())


def test_the_table_has_a_line_for_each_parameter_and_the_right_sums():
    made = make_plan()
    title, header, *lines = made.table().split("\n")
    count = sum(math.prod(shape) for _, shape in SHAPES.values())
    device = sum(row.device_bytes for row in made.rows)
    assert f"{count:,} parameters" in title
    assert f"{4 * count / MIB:.1f} MiB" in title
    assert f"{device / MIB:.1f} MiB a device" in title
    assert header.split() == [
        *("parameter", "shape", "letters"),
        *("spec", "MiB/device", "rule"),
    ]
    assert [line.split()[0] for line in lines] == [row.path for row in made.rows]
    for line, row in zip(lines, made.rows, strict=True):
        assert f"{row.device_bytes / MIB:.3f}" in line
        assert "x".join(map(str, row.shape)) in line


def test_a_70b_model_is_planned_for_64_devices_without_touching_one(monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("a device was asked for")

    model = Model(presets.llama_70b())
    monkeypatch.setattr(jax, "devices", touched)
    monkeypatch.setattr(jax, "device_put", touched)
    made = plan(model.abstract, model.letters, abstract_mesh(dict(fsdp=8, tensor=8)))
    total = sum(row.total_bytes for row in made.rows)
    large = [row for row in made.rows if row.total_bytes >= MIB]
    assert total == 4 * 70_553_706_496
    for row in large:
        ways = 8 if row.letters == "LD" else 64
        assert row.device_bytes * ways == row.total_bytes, row.path

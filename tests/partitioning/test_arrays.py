# SPDX-License-Identifier: Apache-2.0
"""The same numbers with a mesh and without, lying where the tables say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sharding import COMPUTE, RESIDUAL, STORAGE

SIZES = dict(B=8, T=4, D=16, N=4, H=2, V=32, F=8)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))


def draw(letters: str, seed: int = 0) -> np.ndarray:
    """Whole numbers, so that sums are exact in any order."""
    shape = tuple(SIZES[letter] for letter in letters)
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def put(x: np.ndarray, letters: str, table, mesh) -> jax.Array:
    return jax.device_put(x, sharding.named_sharding(letters, table, mesh))


@pytest.mark.parametrize(
    ("subscripts", "table"),
    [
        ("BTD,DNH->BTNH", COMPUTE),  # no sum over devices
        ("BTNH,NHD->BTD", COMPUTE),  # sums over tensor
        ("BTD,BTF->DF", STORAGE),  # sums over the batch, into STORAGE
    ],
)
def test_einsum_is_that_of_numpy_and_lies_as_its_letters_say(mesh, subscripts, table):
    inputs, out = subscripts.split("->")
    a, b = inputs.split(",")
    x, y = draw(a), draw(b, 1)
    expected = np.einsum(subscripts, x, y)
    plain = sharding.einsum(subscripts, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_array_equal(plain, expected)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda x, y: sharding.einsum(subscripts, x, y, table=table))(
            put(x, a, COMPUTE, mesh), put(y, b, COMPUTE, mesh)
        )
    np.testing.assert_array_equal(got, expected)
    assert got.sharding.spec == sharding.spec(out, table, mesh)


def test_einsum_accumulates_in_the_dtype_it_is_given(mesh):
    x, y = jnp.ones((1, 1, 512), jnp.bfloat16), jnp.full((512, 1), 1.01, jnp.bfloat16)
    out = sharding.einsum("BTD,DF->BTF", x, y, dtype=jnp.dtype(jnp.float32))
    assert out.dtype == jnp.float32
    assert float(out[0, 0, 0]) == 512 * float(y[0, 0])
    assert sharding.einsum("BTD,DF->BTF", x, y).dtype == jnp.bfloat16


def test_gather_casts_and_moves_from_storage_to_compute(mesh):
    w = draw("DNH")
    plain = sharding.gather(jnp.asarray(w), "DNH", jnp.dtype(jnp.bfloat16))
    with jax.set_mesh(mesh):
        moved = jax.jit(lambda w: sharding.gather(w, "DNH", jnp.dtype(jnp.bfloat16)))(
            put(w, "DNH", STORAGE, mesh)
        )
    for got in (plain, moved):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got.astype(jnp.float32), w)
    assert moved.sharding.spec == jax.P(None, "tensor", None)


def test_gather_moves_the_narrow_type(mesh):
    with jax.set_mesh(mesh):
        gather = jax.make_jaxpr(
            lambda w: sharding.gather(w, "DNH", jnp.dtype(jnp.bfloat16))
        )
        eqns = gather(put(draw("DNH"), "DNH", STORAGE, mesh)).eqns
    (reshard,) = [eqn for eqn in eqns if eqn.primitive.name == "reshard"]
    assert reshard.invars[0].aval.str_short().startswith("bfloat16[")


def test_constrain_moves_data_and_changes_none_of_it(mesh):
    x = draw("BTD")
    plain = jnp.asarray(x)
    assert sharding.constrain(plain, "BTD") is plain
    with jax.set_mesh(mesh):
        placed = put(x, "BTD", STORAGE, mesh)
        moved = jax.jit(lambda x: sharding.constrain(x, "BTD"))(placed)
        back = jax.jit(lambda x: sharding.constrain(x, "BTD", STORAGE))(moved)
    assert moved.sharding.spec == jax.P(("data", "fsdp"), None, None)
    assert back.sharding.spec == jax.P(None, None, "fsdp")
    np.testing.assert_array_equal(moved, x)
    np.testing.assert_array_equal(back, x)


def test_place_like_moves_data_to_where_another_array_is(mesh):
    x, other = draw("BTD"), draw("BTD", 1)
    plain = jnp.asarray(x)
    assert sharding.spec_of(plain) is None
    assert sharding.place_like(plain, jnp.asarray(other)) is plain
    with jax.set_mesh(mesh):
        other = put(other, "BTD", RESIDUAL, mesh)
        assert sharding.spec_of(other) == jax.P(("data", "fsdp"), "tensor", None)
        moved = jax.jit(sharding.place_like)(put(x, "BTD", COMPUTE, mesh), other)
    assert moved.sharding == other.sharding
    np.testing.assert_array_equal(moved, x)


def test_axes_of_names_the_axes_that_cut_a_letter(mesh):
    assert sharding.axes_of("B") == ()
    assert sharding.out_sharding("BT") is None
    with jax.set_mesh(mesh):
        assert sharding.axes_of("B") == ("data", "fsdp")
        assert sharding.axes_of("T") == ()  # context has size 1
        assert sharding.axes_of("V") == ("tensor",)
        assert sharding.axes_of("D") == ()  # COMPUTE does not cut it
        assert sharding.out_sharding("VD", STORAGE) == jax.P("tensor", "fsdp")


def test_local_gives_each_device_its_part(mesh):
    def parts(x, w):
        return x * 2, w.sum()[None, None], jnp.array(x.shape)

    def call(x, w):
        outs = ("BT", jax.P(None, "tensor"), "")
        return sharding.local(parts, ("BT", "VD"), outs)(x, w)

    x, w = draw("BT"), draw("VD", 1)
    doubled, total, shape = call(x, w)  # no mesh: the function as it is
    np.testing.assert_array_equal(doubled, 2 * x)
    assert float(total[0, 0]) == w.sum()
    assert shape.tolist() == [8, 4]
    with jax.set_mesh(mesh):
        doubled, total, shape = jax.jit(call)(
            put(x, "BT", COMPUTE, mesh), put(w, "VD", COMPUTE, mesh)
        )
    np.testing.assert_array_equal(doubled, 2 * x)
    np.testing.assert_array_equal(total, [[w[:16].sum(), w[16:].sum()]])
    assert shape.tolist() == [2, 4]
    assert doubled.sharding.spec == jax.P(("data", "fsdp"), None)


@pytest.mark.parametrize(
    ("table", "shared"),
    # That of x is whole on each device of tensor, or a part of T.
    [(COMPUTE, "('data', 'fsdp')"), (RESIDUAL, "('data', 'fsdp', 'tensor')")],
)
def test_local_adds_up_gradients_over_the_devices_that_share_an_argument(
    mesh, table, shared
):
    def scaled(x, scale, ids):
        return x * scale[None, None] * ids[..., None].astype(x.dtype)

    def loss(x, scale, ids, weights):
        where = sharding.spec_of(x)
        ins = (where, "D", sharding.spec_of(ids))
        out = sharding.local(scaled, ins, where)(x, scale, ids)
        return (out * weights).sum()

    x, scale, weights = draw("BTD"), draw("D", 1), draw("BTD", 2)
    ids = draw("BT", 3).astype(np.int32)
    gradient = jax.grad(loss, (0, 1))
    expected = gradient(jnp.asarray(x), jnp.asarray(scale), ids, weights)
    with jax.set_mesh(mesh):
        args = (
            put(x, "BTD", table, mesh),
            put(scale, "D", COMPUTE, mesh),
            put(ids, "BT", table, mesh),
            put(weights, "BTD", table, mesh),
        )
        got = jax.jit(gradient)(*args)
        jaxpr = str(jax.make_jaxpr(gradient)(*args))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert jaxpr.count("psum[") == 1
    assert f"psum[axes={shared}" in jaxpr


@pytest.mark.parametrize("letters", ["VD", "DNH", "NH", "H"])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(data=2, fsdp=2, tensor=2),
        dict(fsdp=2, context=4),
        dict(context=2, expert=4),
        dict(data=8),
        {},
    ],
)
def test_reduce_to_storage_sums_the_parts_of_the_batch(letters, sizes):
    mesh = sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
    x, w = draw("BT"), draw(letters, 1)

    def gradient(x, w):
        return sharding.reduce_to_storage(x.sum() * w, letters)

    def call(x, w):
        stored = sharding.out_sharding(letters, STORAGE)
        return sharding.local(gradient, ("BT", letters), stored)(x, w)

    np.testing.assert_array_equal(call(x, w), x.sum() * w)
    with jax.set_mesh(mesh):
        got = jax.jit(call)(put(x, "BT", COMPUTE, mesh), put(w, letters, COMPUTE, mesh))
    np.testing.assert_array_equal(got, x.sum() * w)
    assert got.sharding.spec == sharding.spec(letters, STORAGE, mesh)


def test_along_one_axis_the_tables_know_the_others_only(mesh):
    x_BTD, w_DF = draw("BTD"), draw("DF", 1)
    seen = {}

    def part(x_BTD, w_DF):
        seen["outside"] = sharding.axes_of("B"), sharding.out_sharding("BTD")

        def block(x_BTD, w_DF):
            seen["inside"] = sharding.axes_of("B"), sharding.axes_of("F")
            scale = 1 + jax.lax.axis_index("tensor").astype(jnp.float32)
            return x_BTD @ w_DF * scale

        y_BTF = sharding.local(block, ("BTD", "DF"), "BTF")(
            x_BTD, sharding.gather(w_DF, "DF", jnp.dtype(jnp.float32))
        )
        return sharding.einsum("BTF,BTF->", y_BTF, y_BTF) / 2

    def whole(x_BTD, w_DF):
        def add_up(x_BTD, w_DF):
            total, pullback = jax.vjp(part, x_BTD, w_DF)
            dx_BTD, dw_DF = pullback(jnp.ones((), jnp.float32))
            return jax.lax.psum(total, "data"), dx_BTD, jax.lax.psum(dw_DF, "data")

        batch, rest = jax.P("data"), jax.P()
        run = sharding.along("data", add_up, (batch, rest), (rest, batch, rest))
        return run(x_BTD, w_DF)

    with jax.set_mesh(mesh):
        total, dx_BTD, dw_DF = jax.jit(whole)(
            put(x_BTD, "BTD", COMPUTE, mesh), put(w_DF, "DF", STORAGE, mesh)
        )
    assert seen["outside"] == (("fsdp",), jax.P("fsdp", None, None))
    assert seen["inside"] == (("fsdp",), ("tensor",))
    scale_F = np.repeat([1.0, 2.0], SIZES["F"] // 2)
    y_BTF = x_BTD @ w_DF * scale_F
    np.testing.assert_array_equal(total, np.sum(y_BTF**2) / 2)
    np.testing.assert_array_equal(dx_BTD, (y_BTF * scale_F) @ w_DF.T)
    np.testing.assert_array_equal(
        dw_DF, np.einsum("BTD,BTF->DF", x_BTD, y_BTF * scale_F)
    )
    assert dx_BTD.sharding.spec == sharding.spec("BTD", COMPUTE, mesh)
    assert dw_DF.sharding.spec == sharding.spec("DF", STORAGE, mesh)


def test_add_along_completes_sums_over_the_batch(mesh):
    x_BTD, w_D = draw("BTD"), draw("D", 1)

    def loss(x_BTD, w_D, share):
        total = sharding.add_along("B", (x_BTD * w_D[None, None]).sum())
        return share * total**2

    def replica(x_BTD, w_D):
        values = jax.value_and_grad(loss, (0, 1))(x_BTD, w_D, 0.5)
        total, (dx_BTD, dw_D) = values
        return jax.lax.psum(total, "data"), dx_BTD, jax.lax.psum(dw_D, "data")

    expected, (dx_BTD, dw_D) = jax.value_and_grad(loss, (0, 1))(x_BTD, w_D, 1.0)
    batch, rest = jax.P("data"), jax.P()
    with jax.set_mesh(mesh):
        run = sharding.along("data", replica, (batch, rest), (rest, batch, rest))
        got = jax.jit(run)(put(x_BTD, "BTD", COMPUTE, mesh), put(w_D, "D", {}, mesh))
    for a, b in zip(got, (expected, dx_BTD, dw_D), strict=True):
        np.testing.assert_array_equal(a, b)

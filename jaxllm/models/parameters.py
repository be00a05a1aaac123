# SPDX-License-Identifier: Apache-2.0
"""Parameters with letters, and the operations that read them from STORAGE."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

import sharding

_SUM_STD = (8 * (2**32 - 1) / 12) ** 0.5  # of eight numbers from 0 to 2**16 - 1
_COUNTS = 2**32  # numbers of a uint32, and so elements that one key can tell apart


def matrix(key: jax.Array, shape: tuple[int, ...], axes: str, std: float) -> nnx.Param:
    """Returns a float32 parameter from a bell curve that ends at 4.9 deviations.

    The sum of eight 16-bit numbers (Irwin-Hall), because integers and one product give
    the same bits on every device and however the array is sharded; the inverse error
    function behind `jax.random.normal` does not.
    """
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(_draw(key, shape) * (std / _SUM_STD), axes=axes)


def vector(value: float, shape: tuple[int, ...], axes: str) -> nnx.Param:
    """Returns a float32 parameter that starts as a constant: a scale or a bias."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def stack(make: Callable[[jax.Array], nnx.Module], keys: jax.Array) -> nnx.Module:
    """Returns a module for each of keys as one, parameters with a leading dim L."""
    stacked = jax.vmap(make)(keys)
    return jax.tree.map(
        lambda p: p.replace(axes="L" + p.get_metadata("axes")),
        stacked,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Param),
    )


def project(
    subscripts: str, x: jax.Array, w: jax.Array, rematted: bool = False
) -> jax.Array:
    """Multiplies activations by one parameter: `project_all` of a single one."""
    return project_all(subscripts, x, (w,), rematted)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project_all(
    subscripts: str,
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    rematted: bool = False,
) -> tuple[jax.Array, ...]:
    """Multiplies activations by each parameter, which is gathered for this use only.

    The backward pass gathers it again instead of keeping it, and adds up the
    parameter's gradient in float32 whatever the dtype of x: products leave the matmul
    as float32 and are reduced over the batch as float32, straight into STORAGE. The
    gradient of x is the sum over all parameters before it is added up over devices:
    once, where separate calls would do so each (Shoeybi et al., arXiv:1909.08053).

    Args:
      subscripts: "x letters,w letters,...->out letters,...", as many as weights.
      x: placed by COMPUTE, or by RESIDUAL: then each pass gathers it, and its gradient
        is sharded like it. Its dtype is the matmul's.
      weights: float32, placed by STORAGE.
      rematted: the call is inside `jax.checkpoint`, whose second forward pass gathers
        already: its backward pass then takes that, instead of a third gather.
    """
    return _project_forward(subscripts, x, weights, rematted)[0]


def _project_forward(subscripts, x, weights, rematted):
    x_letters, each = _letters(subscripts, len(weights))
    used = _gather_all(each, weights, x.dtype)
    whole = sharding.constrain(x, x_letters)
    outs = tuple(
        sharding.einsum(f"{x_letters},{w_letters}->{y_letters}", whole, w)
        for (w_letters, y_letters), w in zip(each, used, strict=True)
    )
    return outs, (x, used if rematted else weights)


def _project_backward(subscripts, rematted, saved, dys):
    x, weights = saved
    dx = _input_gradient(subscripts, rematted, weights, dys, like=x)
    return dx, _weight_gradients(subscripts, x, dys)


def _input_gradient(subscripts, rematted, weights, dys, like):
    x_letters, each = _letters(subscripts, len(weights))
    used = weights if rematted else _gather_all(each, weights, like.dtype)
    return sharding.add_products(
        *(
            (f"{y_letters},{w_letters}->{x_letters}", dy, w)
            for (w_letters, y_letters), dy, w in zip(each, dys, used, strict=True)
        ),
        like=like,
    )


def _weight_gradients(subscripts, x, dys):
    x_letters, each = _letters(subscripts, len(dys))
    whole = sharding.constrain(x, x_letters)
    return tuple(
        sharding.einsum(
            f"{x_letters},{y_letters}->{w_letters}",
            whole,
            dy,
            table=sharding.STORAGE,
            dtype=jnp.float32,
        )
        for (w_letters, y_letters), dy in zip(each, dys, strict=True)
    )


project_all.defvjp(_project_forward, _project_backward)

_DOWN = "BTF,FD->BTD"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def project_gated(
    hidden: Callable[[jax.Array, jax.Array], jax.Array],
    up_BTF: jax.Array,
    gate_BTF: jax.Array,
    w_FD: jax.Array,
    rematted: bool = False,
) -> jax.Array:
    """Multiplies hidden(up, gate) by a parameter, as `project` does.

    The backward pass keeps up and gate only: it computes them again in the
    pass over both that makes their gradients, where it costs no reading.

    Args:
      hidden: of up and gate, element by element.
      up_BTF: placed by COMPUTE, as is gate_BTF. Their dtype is the matmul's.
      w_FD: float32, placed by STORAGE.
      rematted: as for `project_all`.
    """
    return _gated_forward(hidden, up_BTF, gate_BTF, w_FD, rematted)[0]


def _gated_forward(hidden, up_BTF, gate_BTF, w_FD, rematted):
    h_BTF = hidden(up_BTF, gate_BTF)
    (out_BTD,), (_, kept) = _project_forward(_DOWN, h_BTF, (w_FD,), rematted)
    return out_BTD, (up_BTF, gate_BTF, kept)


def _gated_backward(hidden, rematted, saved, dout_BTD):
    up_BTF, gate_BTF, kept = saved
    dh_BTF = _input_gradient(_DOWN, rematted, kept, (dout_BTD,), like=up_BTF)
    h_BTF, pull_back = jax.vjp(hidden, up_BTF, gate_BTF)
    (dw_FD,) = _weight_gradients(_DOWN, h_BTF, (dout_BTD,))
    return *pull_back(dh_BTF), dw_FD


project_gated.defvjp(_gated_forward, _gated_backward)


def _gather_all(each, weights, dtype):
    return tuple(
        sharding.gather(w, w_letters, dtype)
        for (w_letters, _), w in zip(each, weights, strict=True)
    )


def _letters(subscripts: str, num_weights: int) -> tuple[str, list[tuple[str, str]]]:
    """Returns the letters of x, and of each weight with its result."""
    inputs, _, outs = subscripts.partition("->")
    x_letters, *w_letters = inputs.split(",")
    y_letters = outs.split(",")
    assert len(w_letters) == len(y_letters) == num_weights, subscripts
    return x_letters, list(zip(w_letters, y_letters, strict=True))


def add_bias(x: jax.Array, bias: jax.Array, letters: str) -> jax.Array:
    """Adds a parameter to the last dims of x, in float32, as dtype of x."""
    bias = sharding.gather(bias, letters, jnp.float32)
    bias = bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(
    tokens_BT: jax.Array, table_VD: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns x_BTD, rows of a table that may be sharded on V; its gradient is float32.

    Every device looks up the words that it has; the sum over V's axes completes them.
    """
    lookup = sharding.local(_lookup, ("BT", "VD"), "BTD")
    return lookup(tokens_BT, sharding.gather(table_VD, "VD", dtype))


def _embed_forward(tokens_BT, table_VD, dtype):
    return embed(tokens_BT, table_VD, dtype), (tokens_BT, table_VD)


def _embed_backward(dtype, saved, dx_BTD):
    tokens_BT, table_VD = saved

    def scatter(tokens_BT, dx_BTD):
        words, d = table_VD.shape[0] // _num_parts("V"), table_VD.shape[1]
        ids_BT, held_BT1 = _local_ids(tokens_BT, words)
        dx_BTD = jnp.where(held_BT1, dx_BTD.astype(jnp.float32), 0.0)
        dtable_VD = jnp.zeros((words, d), jnp.float32).at[ids_BT].add(dx_BTD)
        return sharding.reduce_to_storage(dtable_VD, "VD")

    stored = sharding.out_sharding("VD", sharding.STORAGE)
    dtable_VD = sharding.local(scatter, ("BT", "BTD"), stored)(tokens_BT, dx_BTD)
    return None, dtable_VD


embed.defvjp(_embed_forward, _embed_backward)


def _lookup(tokens_BT, table_VD):
    ids_BT, held_BT1 = _local_ids(tokens_BT, table_VD.shape[0])
    x_BTD = jnp.where(held_BT1, table_VD[ids_BT], jnp.zeros((), table_VD.dtype))
    axes = sharding.axes_of("V")
    return jax.lax.psum(x_BTD, axes) if axes else x_BTD


def _local_ids(tokens_BT, words):
    axes = sharding.axes_of("V")
    ids_BT = tokens_BT - (jax.lax.axis_index(axes) * words if axes else 0)
    held_BT = (ids_BT >= 0) & (ids_BT < words)
    return jnp.where(held_BT, ids_BT, 0), held_BT[..., None]


def _num_parts(letter: str) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    num = 1
    for axis in sharding.axes_of(letter):
        num *= mesh.shape[axis]
    return num


# Traced once for each shape: tracing it for each parameter took most of a model's time.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def _draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns sums of eight random numbers, float32 and whole, around 0."""
    total = jnp.zeros(shape, jnp.int32)
    for draw in range(4):
        bits = _random_bits(key, shape, draw)
        total += ((bits >> 16) + (bits & 0xFFFF)).astype(jnp.int32)
    return (total - 4 * 0xFFFF).astype(jnp.float32)


def _random_bits(key: jax.Array, shape: tuple[int, ...], draw: int) -> jax.Array:
    """Returns uint32 that depend on the key, the draw and the element's index only.

    A hash of the index is good enough to begin from, is sharded like any elementwise
    operation, and compiles in a tenth of the time of `jax.random.bits`. Where a uint32
    cannot count the elements, such as those of 256 large experts, each index along the
    first dims has a key of its own.
    """
    own = next(n for n in range(len(shape) + 1) if math.prod(shape[n:]) <= _COUNTS)
    index = jnp.zeros(shape, jnp.uint32)
    for dim in range(own, len(shape)):
        stride = math.prod(shape[dim + 1 :])
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
        index = index + place * jnp.uint32(stride)
    if own:
        keys = jnp.arange(math.prod(shape[:own]), dtype=jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, keys)
        key = keys.reshape(*shape[:own], *(1 for _ in shape[own:]))
    words = jax.random.key_data(key)
    first, second = words[..., 0], words[..., 1]
    salt = jnp.uint32(draw * 0x9E3779B9 % 2**32)
    return _mix(_mix(index ^ first) + (second ^ salt))


def _mix(x: jax.Array) -> jax.Array:
    """Returns the 32-bit finalizer of MurmurHash3 (Appleby): a change of one bit of x
    changes each bit of the result with a chance of one half."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

# SPDX-License-Identifier: Apache-2.0
"""The MLPs of experts, and the way of tokens to them and back.

A device along `expert` holds the weights of E / X experts, where X is the size of that
axis, and the tokens of its own rows. A token is D values of b bytes; a device has t.

- Without a capacity, every device along `expert` gets all tokens of the others, picks
  those of its experts, and returns its part of their sums. No token is ever dropped,
  and shapes are known beforehand. Each device sends (X - 1) t D b bytes in an
  all-gather and as many in a reduce-scatter; backward, two and one. An all-to-all of
  exactly the pairs of a token and its expert would send min(1, A / X) times that,
  but XLA has none of sizes that vary for CPUs, where it could be tested.
- With a capacity of C tokens a row and expert, each row's tokens are put in E C places
  that go to their experts and return by all-to-alls: rows E C D b (X - 1) / X bytes
  each, two forward and three backward. Places may stay empty; tokens without one have
  no output of that expert, and the residual stream is all that they keep.

Shares, and which experts, are also exchanged: A times 8 bytes a token at most.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from jaxllm.models.mlp import ACTIVATIONS, gated
from jaxllm.models.moe.dispatch import sort_rows
from pallas_kernels.grouped_matmul import grouped_matmul

LETTERS = {"up": "EDF", "gate": "EDF", "down": "EFD"}
BIASES = {"up_bias": "EF", "gate_bias": "EF", "down_bias": "ED"}
_LETTERS = LETTERS | BIASES
ROWS_MULTIPLE = 8  # of rows that a kernel takes; those of one token may be fewer
ROUTED = ("BTD", "BTA", "BTA")


@dataclasses.dataclass(frozen=True)
class Experts:
    """What the experts of a layer do, without their weights."""

    num_experts: int
    activation: str  # of ModelConfig.mlp
    capacity: int | None  # tokens of a row that an expert takes
    implementation: str  # of the grouped matmul
    limit: float | None = None  # of a clamped activation
    share_of: str = "output"  # of ModelConfig.moe


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_experts(
    experts: Experts,
    x_BTD: jax.Array,
    share_BTA: jax.Array,
    choice_BTA: jax.Array,
    weights: Mapping[str, jax.Array],
) -> jax.Array:
    """Returns the sum of each token's experts, each times its share.

    The backward pass makes the hidden values again: A times as many as a dense layer's,
    in arrays of which only the worst case is known, they are too many to keep. As in
    `project`, weights are gathered for each pass, and their gradients are added up in
    float32, straight into STORAGE.

    Args:
      experts: what is common to all.
      x_BTD: placed by COMPUTE; its dtype is that of the matmuls.
      share_BTA: float32.
      choice_BTA: int32; num_experts is no expert.
      weights: float32, placed by STORAGE; "up", "down" and maybe "gate", by LETTERS,
        and maybe a bias of each, by BIASES.
    """
    names = tuple(weights)

    def block(x, share, choice, *values):
        used = dict(zip(names, values, strict=True))
        forward = _forward_all if experts.capacity is None else _forward_placed
        axes = sharding.axes_of("F")
        out = forward(experts, x, share, choice, used)
        return jax.lax.psum(out, axes) if axes else out

    ins = (*ROUTED, *(_LETTERS[name] for name in names))
    used = _gathered(weights, x_BTD.dtype)
    return sharding.local(block, ins, "BTD")(x_BTD, share_BTA, choice_BTA, *used)


def _forward(experts, x_BTD, share_BTA, choice_BTA, weights):
    saved = (x_BTD, share_BTA, choice_BTA, weights)
    return run_experts(experts, *saved), saved


def _backward(experts, saved, dout_BTD):
    x_BTD, share_BTA, choice_BTA, weights = saved
    names = tuple(weights)

    def block(dout, x, share, choice, *values):
        # Wide weights have wide gradients; their products are those of the narrow ones.
        used = {
            name: value.astype(np.promote_types(value.dtype, np.float32))
            for name, value in zip(names, values, strict=True)
        }
        backward = _backward_all if experts.capacity is None else _backward_placed
        axes = sharding.axes_of("F")
        dx, dshare, dweights = backward(experts, dout, x, share, choice, used)
        if axes:
            dx, dshare = jax.lax.psum((dx, dshare), axes)
            if "down_bias" in dweights:
                dweights["down_bias"] = jax.lax.psum(dweights["down_bias"], axes)
        reduced = (
            sharding.reduce_to_storage(dweights[name], _LETTERS[name]) for name in names
        )
        return dx, dshare, *reduced

    letters = [_LETTERS[name] for name in names]
    stored = (sharding.out_sharding(axes, sharding.STORAGE) for axes in letters)
    run = sharding.local(block, ("BTD", *ROUTED, *letters), ("BTD", "BTA", *stored))
    used = _gathered(weights, x_BTD.dtype)
    dx_BTD, dshare_BTA, *dweights = run(dout_BTD, x_BTD, share_BTA, choice_BTA, *used)
    return dx_BTD, dshare_BTA, None, dict(zip(names, dweights, strict=True))


run_experts.defvjp(_forward, _backward)


def _gathered(weights, dtype):
    return [
        sharding.gather(w, _LETTERS[name], w.dtype if name in BIASES else dtype)
        for name, w in weights.items()
    ]


def _mlp(experts, rows, share, sizes, weights):
    """Returns the output of each row's expert, times its share."""
    num_rows = rows.shape[0]
    spare = -num_rows % ROWS_MULTIPLE
    rows, share = jnp.pad(rows, ((0, spare), (0, 0))), jnp.pad(share, (0, spare))
    product = functools.partial(
        grouped_matmul,
        group_sizes_E=sizes,
        implementation=experts.implementation,
    )
    wide = np.promote_types(rows.dtype, np.float32)
    share = share[:, None].astype(wide)
    if experts.share_of == "input":
        rows, share = (rows * share).astype(rows.dtype), jnp.ones_like(share)
    add_bias = functools.partial(_add_bias, weights, sizes, rows.dtype)
    hidden = add_bias("up_bias", product(rows, weights["up"]).astype(wide))
    if "gate" in weights:
        gate = add_bias("gate_bias", product(rows, weights["gate"]).astype(wide))
        hidden = gated(experts.activation, experts.limit, hidden, gate)
    else:
        hidden = ACTIVATIONS[experts.activation](hidden)
    # Here and not on the output: its gradient then recomputes no output.
    out = product((hidden * share).astype(rows.dtype), weights["down"])
    if "down_bias" in weights:
        times = share
        if axes := sharding.axes_of("F"):
            # Parts of the product are added up later: one of them has the bias.
            times = jnp.where(jax.lax.axis_index(axes) == 0, share, 0.0)
        out = add_bias("down_bias", out.astype(wide), times).astype(rows.dtype)
    return out[:num_rows]


def _add_bias(weights, sizes, dtype, name, out, times: jax.Array | float = 1.0):
    """Adds each row's expert's bias, if there is one, to out [rows, width]."""
    if name not in weights:
        return out
    return out + times * _bias_of_rows(weights[name], sizes, out.shape[0], dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _bias_of_rows(bias, sizes, num_rows, dtype):
    """Returns the bias of each row's expert, zeros behind the last one's rows.

    Args:
      bias: [groups, width].
      sizes: int32 [groups].
      num_rows: of the result.
      dtype: of the matmuls.
    """
    group = _group_of_row(sizes, num_rows)
    return bias.at[group].get(mode="fill", fill_value=0)


def _bias_forward(bias, sizes, num_rows, dtype):
    return _bias_of_rows(bias, sizes, num_rows, dtype), sizes


def _bias_backward(num_rows, dtype, sizes, dout_TF):
    # A matmul: rows added to their expert's would come in any order on a GPU.
    group_T = _group_of_row(sizes, num_rows)
    is_of_TE = group_T[:, None] == jnp.arange(sizes.size, dtype=jnp.int32)[None]
    dbias_EF = jnp.einsum(
        "TE,TF->EF",
        is_of_TE.astype(dtype),
        dout_TF.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dout_TF.dtype,
    )
    return dbias_EF, None


_bias_of_rows.defvjp(_bias_forward, _bias_backward)


def _group_of_row(sizes, num_rows):
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.searchsorted(jnp.cumsum(sizes), rows, side="right").astype(jnp.int32)


def _mlp_backward(experts, rows, share, sizes, weights, dout):
    def mlp(rows, share, weights):
        return _mlp(experts, rows, share, sizes, weights)

    return jax.vjp(mlp, rows, share, weights)[1](dout)


# Without a capacity: all tokens along `expert` come to the weights.


def _forward_all(experts, x, share, choice, weights):
    def part(x, share, choice):
        rows = _rows_here(experts, choice, weights)
        taken = (rows.take(x), rows.take_each(share), rows.sizes)
        return rows.add_up(_mlp(experts, *taken, weights))

    tokens = [_by_token(value) for value in (x, share, choice)]
    axes = sharding.axes_of("E")
    if not axes:
        return part(*tokens).reshape(x.shape)
    # One device's tokens at a time: rows of the worst case exist for those alone.
    everyone = [jax.lax.all_gather(value, axes) for value in tokens]
    out = jax.lax.map(lambda tokens: part(*tokens), everyone)
    return jax.lax.psum_scatter(out, axes).reshape(x.shape)


def _backward_all(experts, dout, x, share, choice, weights):
    def part(total, tokens):
        dout, x, share, choice = tokens
        rows = _rows_here(experts, choice, weights)
        taken = (rows.take(x), rows.take_each(share), rows.sizes)
        drows, dshare, dweights = _mlp_backward(
            experts, *taken, weights, rows.take(dout)
        )
        total = jax.tree.map(jnp.add, total, dweights)
        return total, (rows.add_up(drows), rows.give_each(dshare))

    zeros = jax.tree.map(jnp.zeros_like, weights)
    tokens = [_by_token(value) for value in (dout, x, share, choice)]
    axes = sharding.axes_of("E")
    if axes:
        everyone = [jax.lax.all_gather(value, axes) for value in tokens]
        dweights, parts = jax.lax.scan(part, zeros, everyone)
        dx, dshare = (jax.lax.psum_scatter(value, axes) for value in parts)
    else:
        dweights, (dx, dshare) = part(zeros, tokens)
    return dx.reshape(x.shape), dshare.reshape(share.shape), dweights


def _rows_here(experts, choice, weights):
    """Returns the rows of the experts whose weights are here."""
    num_here = weights["up"].shape[0]
    axes = sharding.axes_of("E")
    first = jax.lax.axis_index(axes) * num_here if axes else 0
    # Experts of other devices, also those before: a number above all groups.
    groups = jnp.where(choice < first, experts.num_experts, choice - first)
    num_tokens, num_choices = choice.shape
    return sort_rows(groups, num_here, num_tokens * min(num_choices, num_here))


# With a capacity: the places of experts go to the weights.


def _forward_placed(experts, x, share, choice, weights):
    rows = _placed_rows(experts, choice)
    there, back = _exchanges(experts, x)
    values = there(rows.take(_by_token(x)))
    shares = there(rows.take_each(_by_token(share)))
    sizes = _even_sizes(values, weights)
    out = _mlp(experts, values, shares, sizes, weights)
    return rows.add_up(back(out)).reshape(x.shape)


def _backward_placed(experts, dout, x, share, choice, weights):
    rows = _placed_rows(experts, choice)
    there, back = _exchanges(experts, x)
    values = there(rows.take(_by_token(x)))
    shares = there(rows.take_each(_by_token(share)))
    sizes = _even_sizes(values, weights)
    drows, dshare, dweights = _mlp_backward(
        experts, values, shares, sizes, weights, there(rows.take(_by_token(dout)))
    )
    dx = rows.add_up(back(drows)).reshape(x.shape)
    return dx, rows.give_each(back(dshare)).reshape(share.shape), dweights


def _placed_rows(experts, choice):
    num_rows, num_experts = choice.shape[0], experts.num_experts
    groups = num_rows * num_experts
    firsts = jnp.arange(num_rows, dtype=choice.dtype)[:, None, None] * num_experts
    chosen = jnp.where(choice < num_experts, firsts + choice, groups)
    num_places = groups * experts.capacity
    return sort_rows(_by_token(chosen), groups, num_places, experts.capacity)


def _exchanges(experts, x):
    """Returns how places go to their experts, which sorts them by expert, and back."""
    axes = sharding.axes_of("E")
    ways = jax.lax.axis_size(axes) if axes else 1
    num_rows, here = x.shape[0], experts.num_experts // ways

    def there(values):
        rest = (experts.capacity, *values.shape[1:])
        values = values.reshape(num_rows, ways, here, *rest)
        if axes:
            values = jax.lax.all_to_all(values, axes, 1, 1)
        values = jnp.moveaxis(values, 2, 0)
        return values.reshape(-1, *rest[1:])

    def back(values):
        rest = (experts.capacity, *values.shape[1:])
        values = jnp.moveaxis(values.reshape(here, num_rows, ways, *rest), 0, 2)
        if axes:
            values = jax.lax.all_to_all(values, axes, 1, 1)
        return values.reshape(-1, *rest[1:])

    return there, back


def _even_sizes(values, weights):
    num_here = weights["up"].shape[0]
    return jnp.full(num_here, values.shape[0] // num_here, jnp.int32)


def _by_token(x):
    return x.reshape(-1, *x.shape[2:])

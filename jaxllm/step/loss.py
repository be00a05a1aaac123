# SPDX-License-Identifier: Apache-2.0
"""The loss: output projection and cross-entropy of the next token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import pallas_kernels
import sharding
from jaxllm.config import LossConfig
from pallas_kernels.choice import Implementation

BATCH_LETTERS = ("B", "T")


@dataclasses.dataclass(frozen=True)
class Loss:
    """The output projection and the loss of a model, without arrays."""

    letters: str  # of w: "DV", or "VD" if it is the embedding
    softcap: float | None  # c * tanh(logits / c); None is off
    config: LossConfig  # z_loss is in the objective only
    implementation: Implementation = "auto"  # of the kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def next_token_loss(
    x_BTD: jax.Array, w: jax.Array, targets_BT: jax.Array, loss: Loss
) -> tuple[jax.Array, jax.Array]:
    """Returns the objective and the negative log-likelihood, both float32 sums.

    Sums, because the mean is over the tokens of the global batch, which one microbatch
    does not know. Logits exist for a chunk of tokens and a part of the vocabulary only.

    Args:
      x_BTD: output of the model, placed by COMPUTE.
      w: float32 output projection, placed by STORAGE.
      targets_BT: int32; -1 has no loss.
      loss: what is computed.
    """
    objective, nll = _run(x_BTD, w, targets_BT, loss, with_gradients=False)
    return objective, nll


def row_losses(
    x_BTD: jax.Array, w: jax.Array, targets_BT: jax.Array, loss: Loss
) -> jax.Array:
    """Returns the negative log-likelihood of each row, float32 sums nll_B.

    For a diagnosis: one row after the other. Arguments as for `next_token_loss`.
    """

    def block(x_BTD, w, targets_BT):
        def row(inputs):
            return _terms(inputs[0], w, inputs[1], loss, with_gradients=False).nll

        nll_B = jax.lax.map(row, (x_BTD, targets_BT))
        axes = sharding.axes_of("T")
        return jax.lax.psum(nll_B, axes) if axes else nll_B

    run = sharding.local(block, ("BTD", loss.letters, "BT"), "B")
    return run(x_BTD, sharding.gather(w, loss.letters, x_BTD.dtype), targets_BT)


def _forward(x_BTD, w, targets_BT, loss: Loss):
    objective, nll, dx_BTD, dw = _run(x_BTD, w, targets_BT, loss, with_gradients=True)
    return (objective, nll), (dx_BTD, dw)


def _backward(loss: Loss, saved, cotangents):
    del loss
    dx_BTD, dw = saved
    # nll only reports; its gradient is part of the objective's.
    d_objective, _ = cotangents
    return dx_BTD * d_objective.astype(dx_BTD.dtype), dw * d_objective, None


next_token_loss.defvjp(_forward, _backward)


def _run(
    x_BTD, w, targets_BT, loss: Loss, *, with_gradients: bool
) -> tuple[jax.Array, ...]:
    """Returns objective and nll, and with gradients those by x and by w."""

    def block(x_BTD, w, targets_BT):
        terms = _terms(
            x_BTD.reshape(-1, x_BTD.shape[-1]),
            w,
            targets_BT.reshape(-1),
            loss,
            with_gradients=with_gradients,
        )
        axes = tuple(a for letter in BATCH_LETTERS for a in sharding.axes_of(letter))
        sums = jnp.stack([terms.objective, terms.nll])
        objective, nll = jax.lax.psum(sums, axes) if axes else sums
        if not with_gradients:
            return objective, nll
        assert terms.dx_TD is not None and terms.dw is not None, "asked for above"
        dw = sharding.reduce_to_storage(terms.dw, loss.letters)
        return objective, nll, terms.dx_TD.reshape(x_BTD.shape), dw

    outs: tuple[str | jax.P | None, ...] = ("", "")
    if with_gradients:
        outs = ("", "", "BTD", sharding.out_sharding(loss.letters, sharding.STORAGE))
    run = sharding.local(block, ("BTD", loss.letters, "BT"), outs)
    return run(x_BTD, sharding.gather(w, loss.letters, x_BTD.dtype), targets_BT)


def _terms(x_TD, w, targets_T, loss: Loss, *, with_gradients: bool):
    return pallas_kernels.linear_cross_entropy(
        x_TD,
        w,
        targets_T,
        letters=loss.letters,
        z_loss=loss.config.z_loss,
        softcap=loss.softcap,
        chunk_tokens=loss.config.chunk_tokens,
        vocab_axes=sharding.axes_of("V"),
        with_gradients=with_gradients,
        implementation=loss.implementation,
    )

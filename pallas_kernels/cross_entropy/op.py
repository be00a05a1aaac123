# SPDX-License-Identifier: Apache-2.0
"""The loss of an output projection: checks, and the choice of an implementation."""

import jax

from pallas_kernels.choice import Choice, Implementation, Shaped, choose
from pallas_kernels.cross_entropy.hopper.chunked import chunked_cross_entropy
from pallas_kernels.cross_entropy.reference import Terms, reference_cross_entropy
from pallas_kernels.cross_entropy.tiles import LEAST_WORDS, VECTOR
from pallas_kernels.target import current_target

NAME = "linear_cross_entropy"


def linear_cross_entropy(
    x_TD: jax.Array,
    w: jax.Array,
    targets_T: jax.Array,
    *,
    letters: str,
    z_loss: float,
    softcap: float | None,
    chunk_tokens: int,
    vocab_axes: tuple[str, ...] = (),
    with_gradients: bool,
    implementation: Implementation = "auto",
) -> Terms:
    """Returns the summed loss of softmax(softcap(x w)) and, if asked, its gradients.

    The gradients are made in the same pass as the loss, while a chunk's logits exist:
    no logits are kept, and none are recomputed.

    Args:
      x_TD: bfloat16 or float32, the tokens of this device.
      w: dtype of x, "DV" or "VD": this device's part of the vocabulary.
      targets_T: int32; -1 is no target.
      letters: of w.
      z_loss: weight of the squared logsumexp (Chowdhery et al., arXiv:2204.02311).
      softcap: c * tanh(logits / c); None is off.
      chunk_tokens: tokens for which something as large as the vocabulary exists at one
        time. Each chunk reads and writes all of dw once.
      vocab_axes: mesh axes that shard V; with any, this runs inside `shard_map`.
      implementation: "auto" takes what `choose_cross_entropy` says for this device.

    Raises:
      ValueError: arguments that do not fit each other.
      NotImplementedError: the implementation cannot do what was asked.

    Source: the gradient in the forward pass follows Hsu et al., "Liger Kernel"
    (arXiv:2410.10989).
    """
    _check(x_TD, w, targets_T, letters, z_loss, softcap, chunk_tokens)
    chosen, _ = choose_cross_entropy(
        x_TD, w, letters=letters, implementation=implementation
    )
    functions = dict(xla=reference_cross_entropy, mosaic=chunked_cross_entropy)
    return functions[chosen](
        x_TD,
        w,
        targets_T,
        letters=letters,
        z_loss=z_loss,
        softcap=softcap,
        chunk_tokens=chunk_tokens,
        vocab_axes=vocab_axes,
        with_gradients=with_gradients,
    )


def choose_cross_entropy(
    x_TD: Shaped,
    w: Shaped,
    *,
    letters: str,
    implementation: Implementation = "auto",
) -> Choice:
    """Returns the implementation to run and the reason, for a log.

    Args:
      x_TD: as the others, an argument of `linear_cross_entropy`.

    Raises:
      ValueError: there is no such implementation.
      NotImplementedError: it was named and cannot honour all that was asked.
    """
    target, dtype = current_target(), str(x_TD.dtype)
    num_words = w.shape[letters.index("V")]
    refused = {
        f"device {target.kind} (Hopper)": not target.is_hopper,
        f"dtype {dtype} (bfloat16)": dtype != "bfloat16",
        f"vocabulary of {num_words} on a device (a multiple of {VECTOR}, at least "
        f"{LEAST_WORDS})": num_words % VECTOR != 0 or num_words < LEAST_WORDS,
    }
    refusals = [what for what, is_refused in refused.items() if is_refused]
    return choose(NAME, implementation, {"mosaic": refusals})


def _check(x_TD, w, targets_T, letters, z_loss, softcap, chunk_tokens):
    if letters not in ("DV", "VD"):
        raise ValueError(f"{NAME} got letters={letters!r}; w is 'DV' or 'VD'.")
    if x_TD.ndim != 2 or w.ndim != 2 or x_TD.shape[1] != w.shape[letters.index("D")]:
        raise ValueError(
            f"{NAME} got x {x_TD.shape} and w {w.shape} of letters {letters}: x must be"
            " [T, D], with D that of w; reshape a batch of sequences to one of tokens."
        )
    if x_TD.dtype != w.dtype:
        raise ValueError(
            f"{NAME} got x of {x_TD.dtype} and w of {w.dtype}: cast w to x's dtype."
        )
    if targets_T.shape != x_TD.shape[:1] or targets_T.dtype != "int32":
        raise ValueError(
            f"{NAME} got targets {targets_T.dtype}{list(targets_T.shape)} for x "
            f"{x_TD.shape}: they must be int32[{x_TD.shape[0]}], -1 for no target."
        )
    if chunk_tokens < 1 or x_TD.shape[0] < 1:
        raise ValueError(
            f"{NAME} got chunk_tokens={chunk_tokens} for {x_TD.shape[0]} tokens: both "
            "must be at least 1."
        )
    if z_loss < 0:
        raise ValueError(f"{NAME} got z_loss={z_loss}; it must be at least 0 (off).")
    if softcap is not None and softcap <= 0:
        raise ValueError(
            f"{NAME} got softcap={softcap}; it must be positive, or None (off)."
        )

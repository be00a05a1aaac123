# SPDX-License-Identifier: Apache-2.0
"""The inputs that the backward kernels share, and the weights, recomputed in each.

With P = exp(logits - lse) and D = sum_h(out * dout) the gradients are, a head,
dV = P^T dout, dS = P * (dout V^T - D), dQ = scale * dS K and dK = scale * dS^T Q.
The kernels start the tensor cores' sums for q k and dout V^T from -lse and -D, which
takes no instruction, where subtracting would take registers that they do not have.

Source: Dao, "FlashAttention-2" (arXiv:2307.08691), algorithm 2.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.hopper.forward import LOG2E, tanh

ROWS = 64  # of the least product that a warpgroup makes
# Of a thread, by the number of warpgroups that compute, for these and for the loader.
REGISTERS = {2: (240, 24), 3: (160, 32)}


class Inputs(NamedTuple):
    """What the kernels read, T beyond the last query up to whole tiles."""

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    dout_BTNH: jax.Array
    terms: jax.Array  # float32 [B, N, 2, T]: what products q k, dout v start from
    ranges: jax.Array  # int32 [B, 2, T]: the first key in sight, and the first after


@dataclasses.dataclass(frozen=True)
class BackwardCall:
    """What is known of a call when it is traced."""

    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    scale: float
    softcap: float | None

    @property
    def group(self) -> int:
        return self.q_shape[2] // self.k_shape[2]

    def inputs(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        out_BTNH: jax.Array,
        lse_BNT: jax.Array,
        dout_BTNH: jax.Array,
        start_BT: jax.Array,
        end_BT: jax.Array,
        *,
        multiple: int,
    ) -> Inputs:
        """Returns what the kernels read; multiple is of queries in a tile."""
        out, dout = (x.astype(jnp.float32) for x in (out_BTNH, dout_BTNH))
        # Left to itself, XLA reads both as [B, N, T, H], a head at a time, and even
        # stacks the outputs of all layers that way.
        delta_BTN = jax.lax.optimization_barrier((out * dout).sum(-1))
        delta_BNT = jnp.transpose(delta_BTN, (0, 2, 1))
        per_lse = -LOG2E if self.softcap else -1 / self.scale
        # Weights of a query that sees nothing, not even a sink, are exp2(-inf) = 0.
        lse_BNT = jnp.where(lse_BNT == -jnp.inf, jnp.inf, lse_BNT)
        beyond = -self.q_shape[1] % multiple
        terms = [
            _pad(lse_BNT * per_lse, beyond, -jnp.inf),
            _pad(-delta_BNT, beyond, 0.0),
        ]
        end_BT = jnp.minimum(end_BT, self.k_shape[1])
        ranges = [_pad(x, beyond, 0) for x in (start_BT, end_BT)]
        return Inputs(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            dout_BTNH,
            terms=jnp.stack(terms, 2),
            ranges=jnp.stack(ranges, 1),
        )

    def weights(
        self, s: jax.Array, lse_term: Callable[[], jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Returns P, and P times the derivative of a logit by scale * q k.

        Args:
          s: sums q k that began with lse_term, or with a softcap 0; -inf is masked.
          lse_term: of the shape of s.
        """
        if self.softcap is None:
            p = jnp.exp2(s * (self.scale * LOG2E))
            return p, p
        capped = tanh(s * (self.scale / self.softcap))
        power = capped * (self.softcap * LOG2E) + lse_term()
        p = jnp.exp2(jnp.where(s == -jnp.inf, -jnp.inf, power))
        return p, p * (1.0 - capped * capped)


def hide(
    s: jax.Array,
    first_key: jax.Array,
    dim: int,
    start: Callable[[], jax.Array],
    end: Callable[[], jax.Array],
) -> jax.Array:
    """Returns s with -inf where the key, counted along dim, is out of sight.

    One bound after the other, so that the registers hold but one of them.
    """
    key = plgpu.broadcasted_iota(jnp.int32, s.shape, dim, layout=plgpu.Layout.WGMMA)
    key = key + first_key
    s = jnp.where(key < end(), s, -jnp.inf)
    return jnp.where(key >= start(), s, -jnp.inf)


def zeros(h: int) -> jax.Array:
    """Returns what a gradient of 64 queries or keys starts from."""
    return plgpu.layout_cast(jnp.zeros((ROWS, h), jnp.float32), plgpu.Layout.WGMMA)


def _pad(x: jax.Array, beyond: int, value: float) -> jax.Array:
    widths = [(0, 0)] * (x.ndim - 1) + [(0, beyond)]
    return jnp.pad(x, widths, constant_values=value)

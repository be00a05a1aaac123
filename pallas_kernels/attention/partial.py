# SPDX-License-Identifier: Apache-2.0
"""Attention over some of the keys, and its gradient, as two calls.

What a row sees may be spread over several calls, on this device or on others: merge
the results of the first with `merge_parts`, and give the merged ones to each call of
the second.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.attention.hopper import passes
from pallas_kernels.attention.op import choose_attention
from pallas_kernels.attention.ranges import visible_in_ranges
from pallas_kernels.attention.reference import masked_attention, masked_gradients
from pallas_kernels.choice import Implementation
from pallas_kernels.target import current_target


@dataclasses.dataclass(frozen=True)
class RangedAttention:
    """Attention of each query to the keys start_BT <= s < end_BT; nothing else masks.

    Attributes:
      softcap: c * tanh(logits / c); None is off.
      scale: multiplies the logits; None is H**-0.5.
      deterministic: whether gradients are the same to the bit each time.
      implementation: "auto" takes what `choose_attention` says for this device.
    """

    softcap: float | None = None
    scale: float | None = None
    deterministic: bool = True
    implementation: Implementation = "auto"

    def forward(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        start_BT: jax.Array,
        end_BT: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns out_BTNH, dtype of q, and lse_BNT, float32: the log of the sum of
        exp(logits). A query that sees no key has 0 and -inf.

        Has no gradient of its own; see `backward`.
        """
        scale, kernels = self._choose(q_BTNH, k_BSKH, start_BT)
        if kernels:
            return passes.forward(
                kernels, q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, None
            )
        mask_BTS = visible_in_ranges(start_BT, end_BT, k_BSKH.shape[1])
        return masked_attention(
            q_BTNH, k_BSKH, v_BSKH, mask_BTS, None, softcap=self.softcap, scale=scale
        )

    def backward(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        out_BTNH: jax.Array,
        lse_BNT: jax.Array,
        dout_BTNH: jax.Array,
        start_BT: jax.Array,
        end_BT: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns what these keys add to dq_BTNH, and their dk_BSKH and dv_BSKH.

        Args:
          q_BTNH: as k_BSKH, v_BSKH, start_BT and end_BT what `forward` was given.
          out_BTNH: over all keys that the queries see, as lse_BNT.
          dout_BTNH: the cotangent of out_BTNH.
        """
        scale, kernels = self._choose(q_BTNH, k_BSKH, start_BT)
        if kernels:
            return passes.backward(
                kernels,
                q_BTNH,
                k_BSKH,
                v_BSKH,
                out_BTNH,
                lse_BNT,
                dout_BTNH,
                start_BT,
                end_BT,
            )
        return masked_gradients(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            out_BTNH,
            lse_BNT,
            dout_BTNH,
            mask_BTS=visible_in_ranges(start_BT, end_BT, k_BSKH.shape[1]),
            softcap=self.softcap,
            scale=scale,
        )

    def _choose(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, start_BT: jax.Array
    ) -> tuple[float, passes.Kernels | None]:
        """Returns the scale, and the kernels if they are what is chosen."""
        head_dim = q_BTNH.shape[-1]
        scale = float(head_dim**-0.5 if self.scale is None else self.scale)
        chosen, _ = choose_attention(
            q_BTNH,
            k_BSKH,
            start_BT=start_BT,
            softcap=self.softcap,
            scale=scale,
            deterministic=self.deterministic,
            implementation=self.implementation,
        )
        if chosen == "xla":
            return scale, None
        kernels = passes.find_kernels(
            current_target(),
            head_dim,
            causal=True,
            softcap=self.softcap,
            scale=scale,
            deterministic=self.deterministic,
        )
        return scale, kernels


def merge_parts(
    out_BTNH: jax.Array,
    lse_BNT: jax.Array,
    part_BTNH: jax.Array,
    part_lse_BNT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns out and lse over the keys of both, in the dtypes of out and lse."""
    total_BNT = jnp.logaddexp(lse_BNT, part_lse_BNT)
    floor_BNT = jnp.where(jnp.isneginf(total_BNT), 0.0, total_BNT)  # not -inf - -inf

    def weighted(x_BTNH, lse_BNT):
        weight_BTN = jnp.exp(lse_BNT - floor_BNT).swapaxes(1, 2)
        return x_BTNH.astype(weight_BTN.dtype) * weight_BTN[..., None]

    merged_BTNH = weighted(out_BTNH, lse_BNT) + weighted(part_BTNH, part_lse_BNT)
    return merged_BTNH.astype(out_BTNH.dtype), total_BNT

# SPDX-License-Identifier: Apache-2.0
"""The kernels of an attention call: which ones, and with which tiles."""

import dataclasses
from typing import Any

import jax

from pallas_kernels.attention.hopper.backward_fused import backward_fused
from pallas_kernels.attention.hopper.backward_split import backward
from pallas_kernels.attention.hopper.forward import forward
from pallas_kernels.attention.tiles import (
    FUSED_GRADIENT,
    BackwardTile,
    ForwardTile,
    KeyGradientTile,
    backward_tile,
    forward_tile,
    fused_tile,
)
from pallas_kernels.target import Target


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What the kernels of a call are made from."""

    softcap: float | None
    scale: float
    forward: ForwardTile
    backward: BackwardTile
    fused: KeyGradientTile | None  # None: the backward pass of two kernels

    @classmethod
    def of(
        cls,
        target: Target,
        head_dim: int,
        causal: bool,
        softcap: float | None,
        scale: float,
        deterministic: bool,
    ) -> "Kernels":
        """Returns the kernels and their tiles for the facts of a call."""
        # The derivative of the soft-cap is 568 bytes a thread too many for heads of 64.
        spills = softcap is not None and head_dim == 64
        fused = not deterministic and head_dim in FUSED_GRADIENT and not spills
        return cls(
            softcap=softcap,
            scale=scale,
            forward=forward_tile(target, head_dim, causal=causal),
            backward=backward_tile(target, head_dim, causal=causal),
            fused=fused_tile(target, head_dim, causal=causal) if fused else None,
        )

    def attend(self, *inputs: Any) -> tuple[jax.Array, jax.Array]:
        """Returns `forward` of its arrays."""
        return forward(
            *inputs, softcap=self.softcap, scale=self.scale, tile=self.forward
        )

    def differentiate(self, *arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns `backward` of its arrays."""
        options: dict[str, Any] = dict(softcap=self.softcap, scale=self.scale)
        if self.fused:
            return backward_fused(*arrays, **options, tile=self.fused)
        return backward(*arrays, **options, tile=self.backward)

# SPDX-License-Identifier: Apache-2.0
"""Calls of attention at the shapes of models."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from pallas_kernels.attention.ranges import key_ranges


@dataclasses.dataclass(frozen=True)
class Call:
    """What is asked of attention; `passes` says how much of it is timed."""

    name: str
    shape: tuple[int, int, int, int, int]  # B, T, N, K, H
    causal: bool = True
    window: int = 0
    softcap: float | None = None
    documents: int = 0  # packed into each row; 0 is no segments
    sinks: bool = False
    num_keys: int = 0  # of a cache, whose last place each query takes; 0 is T
    passes: Literal["forward", "both"] = "forward"
    deterministic: bool = True
    in_ci: bool = False

    @property
    def s(self) -> int:
        return self.num_keys or self.shape[1]

    def segments_BT(self) -> np.ndarray:
        """Returns documents of random lengths, the same ones each time."""
        b, t = self.shape[:2]
        rng = np.random.default_rng(0)
        ends = rng.random((b, self.documents - 1, 1)) * t
        return 1 + (np.arange(t) >= ends).sum(1).astype(np.int32)

    def ranges(self, extra: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """Returns start_BT and end_BT."""
        masks = {"segments_BT": None, "positions_BT": None, **extra}
        masks.pop("sinks_N", None)
        b, t, n, _, h = self.shape
        options: dict[str, Any] = dict(causal=self.causal, window=self.window, **masks)
        return key_ranges((b, t, n, h), self.s, **options)

    def extra(self) -> dict[str, Any]:
        """Returns the arrays besides q, k and v, by the name of their argument."""
        b, t, n, _, _ = self.shape
        found: dict[str, Any] = {}
        if self.documents:
            found["segments_BT"] = self.segments_BT()
        if self.num_keys:
            found["positions_BT"] = np.full((b, t), self.s - 1, np.int32)
        if self.sinks:
            found["sinks_N"] = np.linspace(-1, 1, n, dtype=np.float32)
        return found


MHA = {
    64: (2, 8192, 32, 32, 64),
    128: (2, 8192, 16, 16, 128),
    256: (2, 8192, 8, 8, 256),
}
LLAMA = (4, 4096, 32, 8, 128)
CALLS = (
    Call("h64-causal-8k", MHA[64], in_ci=True),
    Call("h128-causal-8k", MHA[128], in_ci=True),
    Call("h256-causal-8k", MHA[256], in_ci=True),
    Call("h64-full-4k", (4, 4096, 32, 32, 64), causal=False),
    Call("h128-full-4k", (4, 4096, 16, 16, 128), causal=False),
    Call("h256-full-4k", (4, 4096, 8, 8, 256), causal=False),
    Call("h128-causal-1k", (16, 1024, 16, 16, 128)),
    Call("h128-causal-32k", (1, 32768, 16, 16, 128)),
    Call("h128-llama-4k", LLAMA),
    Call("h128-packed-8k", (2, 8192, 32, 8, 128), documents=12),
    Call("h256-gemma-4k", (4, 4096, 8, 4, 256), window=1024, softcap=50.0, in_ci=True),
    Call("h64-sinks-4k", (4, 4096, 64, 8, 64), window=128, sinks=True),
)
DECODE = Call("h128-decode-8k", (64, 1, 32, 8, 128), num_keys=8192)
TINY = Call("h64-tiny", (1, 72, 2, 1, 64), documents=2, sinks=True)
FUSED = ("h64-causal-8k", "h128-causal-8k", "h128-llama-4k")
SEARCHED = tuple(call.name for call in CALLS[:6]) + tuple(
    f"{name}-fused" for name in FUSED[:2]
)

# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the arguments of an attention call, said before it is traced."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_arguments(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array | None,
    positions_BT: jax.Array | None,
    sinks_N: jax.Array | None,
    causal: bool,
    window: int,
    softcap: float | None,
    scale: float | None,
) -> None:
    """Checks the arguments of `attention`.

    Raises:
      ValueError: says what is wrong, by name and value, and what would be right.
    """
    _check_arrays(q_BTNH, k_BSKH, v_BSKH)
    b, t, n, _ = q_BTNH.shape
    _check_numbers(causal, window, softcap, scale)
    for name, x in dict(segments_BT=segments_BT, positions_BT=positions_BT).items():
        if x is None:
            continue
        if x.shape != (b, t):
            raise ValueError(
                f"attention got {name} {x.shape} for q {q_BTNH.shape}: it must be "
                f"{(b, t)}, an integer for each query."
            )
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"attention got {name} of {x.dtype}: cast it to int32.")
    if sinks_N is not None and (
        sinks_N.shape != (n,) or not jnp.issubdtype(sinks_N.dtype, jnp.floating)
    ):
        raise ValueError(
            f"attention got sinks_N {sinks_N.dtype}{list(sinks_N.shape)} for {n} query "
            f"heads: it must be a logit for each, such as float32[{n}]."
        )
    places_matter = causal or window > 0
    _check_places(t, k_BSKH.shape[1], segments_BT, positions_BT, places_matter)


def _check_arrays(q_BTNH, k_BSKH, v_BSKH):
    shapes = f"q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}"
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4:
        raise ValueError(
            f"attention got {shapes}: they must be [B, T, N, H] and [B, S, K, H]; "
            "give one row of a batch a B of 1."
        )
    (b, _, n, h), (b_key, _, k, h_key) = q_BTNH.shape, k_BSKH.shape
    if 0 in q_BTNH.shape or 0 in k_BSKH.shape:
        raise ValueError(f"attention got {shapes}: every dimension must be at least 1.")
    if (b, h) != (b_key, h_key) or k_BSKH.shape != v_BSKH.shape or n % k:
        raise ValueError(
            f"attention got {shapes}: k and v must be alike, B and H must be q's, and "
            "N a multiple of K."
        )
    dtypes = [str(x.dtype) for x in (q_BTNH, k_BSKH, v_BSKH)]
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        raise ValueError(
            f"attention got q, k, v of {', '.join(dtypes)}: all must have the same "
            f"dtype, one of {', '.join(DTYPES)}; cast them."
        )


def _check_numbers(causal: Any, window: Any, softcap: Any, scale: Any):
    """Refuses arrays too: they are compiled into the kernel."""
    if not isinstance(causal, bool):
        raise ValueError(f"attention got causal={causal!r}: it must be True or False.")
    if (
        not isinstance(window, numbers.Integral)
        or isinstance(window, bool)
        or window < 0
    ):
        raise ValueError(
            f"attention got window={window!r}: it must be a Python int, the number of "
            "keys a causal query sees at most; 0 is no window."
        )
    if softcap is not None and not (_is_number(softcap) and softcap > 0):
        raise ValueError(
            f"attention got softcap={softcap!r}: it must be a positive Python number; "
            "None is no soft cap."
        )
    if scale is not None and not _is_number(scale):
        raise ValueError(
            f"attention got scale={scale!r}: it must be a finite Python number; None "
            "gives H**-0.5; multiply q by what is computed."
        )


def _check_places(t, s, segments_BT, positions_BT, places_matter: bool):
    if segments_BT is not None and positions_BT is not None:
        raise ValueError(
            "attention got segments_BT and positions_BT: with segments query t is key "
            "t, and positions say otherwise; leave positions_BT out for packed rows."
        )
    if t != s and segments_BT is not None:
        raise ValueError(
            f"attention got {t} queries, {s} keys and segments_BT: documents need T == "
            "S; use positions_BT for a cache."
        )
    if t != s and positions_BT is None and places_matter:
        raise ValueError(
            f"attention got {t} queries and {s} keys: causal and window need "
            "positions_BT then, the place of each query among the keys."
        )


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)

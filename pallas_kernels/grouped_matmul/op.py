# SPDX-License-Identifier: Apache-2.0
"""The grouped matmul: argument checks, gradients, choice of an implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.choice import Choice, Implementation, Shaped, choose
from pallas_kernels.grouped_matmul.hopper import groups
from pallas_kernels.grouped_matmul.hopper.rows import multiply_rows
from pallas_kernels.grouped_matmul.hopper.weights import multiply_weights
from pallas_kernels.grouped_matmul.tiles import Tile, find_tile
from pallas_kernels.target import Target, current_target


def grouped_matmul(
    x_TD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns each row times the matrix of its group, for rows sorted by group.

    Group e is the group_sizes_E[e] rows after those of the groups before it; any sizes,
    also 0. Rows after the last group give zeros and get no gradient, whatever they
    hold. Sizes whose sum exceeds T have no meaning, and no error either.

    Args:
      x_TD: bfloat16, float16, float32 or float64.
      w_EDF: dtype of x, or float32: then it is rounded to x's for the product, and its
        gradient is float32 as it was accumulated.
      group_sizes_E: int32.
      implementation: "auto" takes what `choose_grouped_matmul` says for this device.

    Returns:
      out_TF, dtype of x, named "grouped_matmul" for remat policies. Accumulation is
      float32. Deterministic, gradients too.

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
      NotImplementedError: the implementation cannot do what was asked.
    """
    _check(x_TD, w_EDF, group_sizes_E)
    chosen, _ = choose_grouped_matmul(x_TD, w_EDF, implementation=implementation)
    out_TF = _grouped_matmul(x_TD, w_EDF, group_sizes_E, chosen)
    return checkpoint_name(out_TF, "grouped_matmul")


def choose_grouped_matmul(
    x_TD: Shaped,
    w_EDF: Shaped,
    *,
    implementation: Implementation = "auto",
) -> Choice:
    """Returns the implementation to run and the reason, for a log.

    Raises:
      ValueError: there is no such implementation.
      NotImplementedError: it was named and cannot honour all that was asked.
    """
    refusals = _mosaic_refusals(current_target(), x_TD, w_EDF)
    return choose("grouped_matmul", implementation, {"mosaic": refusals})


def rows_times_weights(
    x_TD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: str,
    transposed: bool = False,
    tile: Tile | None = None,
) -> jax.Array:
    """Returns the product of `grouped_matmul`; transposed: of w_EFD, which lies so.

    Args:
      x_TD: of a dtype that the implementation has.
      w_EDF: dtype of x.
      implementation: "mosaic" or "xla".
      tile: of "mosaic"; None: the one on record.
    """
    if implementation == "xla":
        x_TD = _within_groups(x_TD, group_sizes_E)
        w_EDF = w_EDF.swapaxes(1, 2) if transposed else w_EDF
        out_TF = jax.lax.ragged_dot(
            x_TD, w_EDF, group_sizes_E, preferred_element_type=_wide(x_TD)
        )
        return _within_groups(out_TF, group_sizes_E).astype(x_TD.dtype)
    target, num_columns = current_target(), w_EDF.shape[1 if transposed else 2]
    tile = tile or find_tile(target, "grouped_matmul_rows", num_columns)
    tiles = groups.row_tiles(group_sizes_E, x_TD.shape[0], tile.rows)
    return multiply_rows(
        x_TD,
        w_EDF,
        tiles,
        transposed=transposed,
        tile=tile,
        num_cores=target.num_cores,
    )


def rows_times_rows(
    x_TD: jax.Array,
    y_TF: jax.Array,
    group_sizes_E: jax.Array,
    dtype: jnp.dtype,
    *,
    implementation: str,
    tile: Tile | None = None,
) -> jax.Array:
    """Returns out_EDF, x^T y over the rows of each group; zeros for an empty one.

    Args:
      x_TD: of a dtype that the implementation has.
      y_TF: dtype of x.
      dtype: of the result.
      implementation: "mosaic" or "xla".
      tile: of "mosaic"; None: the one on record.
    """
    if implementation == "xla":
        out_EDF = jax.lax.ragged_dot_general(
            _within_groups(x_TD, group_sizes_E),
            _within_groups(y_TF, group_sizes_E),
            group_sizes_E,
            jax.lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=(((0,), (0,)), ((), ())),
                lhs_ragged_dimensions=[0],
                rhs_group_dimensions=[],
            ),
            preferred_element_type=_wide(x_TD),
        )
        return out_EDF.astype(dtype)
    target = current_target()
    tile = tile or find_tile(target, "grouped_matmul_weights", y_TF.shape[1])
    by_size = groups.groups_by_size(group_sizes_E, x_TD.shape[0])
    return multiply_weights(
        x_TD, y_TF, by_size, dtype=dtype, tile=tile, num_cores=target.num_cores
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x_TD, w_EDF, group_sizes_E, implementation):
    w_EDF = w_EDF.astype(x_TD.dtype)
    return rows_times_weights(x_TD, w_EDF, group_sizes_E, implementation=implementation)


def _forward(x_TD, w_EDF, group_sizes_E, implementation):
    out_TF = _grouped_matmul(x_TD, w_EDF, group_sizes_E, implementation)
    return out_TF, (x_TD, w_EDF, group_sizes_E)


def _backward(implementation, residuals, dout_TF):
    x_TD, w_EDF, group_sizes_E = residuals
    dx_TD = rows_times_weights(
        dout_TF,
        w_EDF.astype(x_TD.dtype),
        group_sizes_E,
        implementation=implementation,
        transposed=True,
    )
    dw_EDF = rows_times_rows(
        x_TD, dout_TF, group_sizes_E, w_EDF.dtype, implementation=implementation
    )
    return dx_TD, dw_EDF, None


_grouped_matmul.defvjp(_forward, _backward)


def _within_groups(x_TD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Zeroes the rows after the last group, of which XLA's product promises nothing."""
    rows_T1 = jnp.arange(x_TD.shape[0])[:, None]
    return jnp.where(rows_T1 < group_sizes_E.sum(), x_TD, jnp.zeros_like(x_TD))


def _wide(x: jax.Array) -> jnp.dtype:
    return np.promote_types(x.dtype, np.float32)


def _mosaic_refusals(target: Target, x_TD, w_EDF) -> list[str]:
    (rows, depth), columns = x_TD.shape, w_EDF.shape[2]
    found = {
        f"platform {target.platform}": target.platform != "gpu",
        f"{target.kind} (Hopper only)": target.platform == "gpu"
        and not target.is_hopper,
        f"dtype {x_TD.dtype} (bfloat16 and float16)": str(x_TD.dtype)
        not in ("bfloat16", "float16"),
        # Mosaic copies to swizzled memory in pieces of 8 rows and 128 bytes.
        f"{rows} rows (multiples of 8)": rows % 8,
        f"widths {depth} and {columns} (multiples of 64)": depth % 64 or columns % 64,
        "empty arrays": 0 in (rows, depth, columns, w_EDF.shape[0]),
    }
    return [name for name, refused in found.items() if refused]


def _check(x_TD, w_EDF, group_sizes_E):
    if x_TD.ndim != 2 or w_EDF.ndim != 3 or x_TD.shape[1] != w_EDF.shape[1]:
        raise ValueError(
            f"grouped_matmul got x {x_TD.shape} and w {w_EDF.shape}: they must be "
            "[T, D] and [E, D, F] of the same D."
        )
    if group_sizes_E.shape != w_EDF.shape[:1]:
        raise ValueError(
            f"grouped_matmul got group_sizes {group_sizes_E.shape} for w "
            f"{w_EDF.shape}: one size for each of the {w_EDF.shape[0]} groups."
        )
    if group_sizes_E.dtype != jnp.int32:
        raise ValueError(
            f"grouped_matmul got group_sizes of {group_sizes_E.dtype}: they are int32."
        )
    if not jnp.issubdtype(x_TD.dtype, jnp.floating) or w_EDF.dtype not in (
        x_TD.dtype,
        jnp.float32,
    ):
        raise ValueError(
            f"grouped_matmul got x of {x_TD.dtype} and w of {w_EDF.dtype}: x must be "
            "float, and w the same or float32."
        )

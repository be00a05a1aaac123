# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul in plain JAX: the specification."""

import jax
import jax.numpy as jnp
import numpy as np


def grouped_matmul_reference(
    x_TD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """Returns out_TF: each row times the matrix of the group that it is in.

    Rows lie sorted by group: group 0 is the first group_sizes_E[0] rows, and so on.
    Rows after the last group give zeros and get no gradient, whatever they hold. A slow
    specification, one product of all rows for each group, in any float dtype.
    """
    ends_E = jnp.cumsum(group_sizes_E)
    rows_T = jnp.arange(x_TD.shape[0], dtype=ends_E.dtype)
    wide = np.promote_types(x_TD.dtype, np.float32)  # float64 stays what it is

    def add_group(out_TF, group):
        w_DF, start, end = group
        inside_T1 = ((rows_T >= start) & (rows_T < end))[:, None]
        # Before the product too: rows of others may hold NaN, whose gradient is NaN.
        own_TD = jnp.where(inside_T1, x_TD, jnp.zeros_like(x_TD))
        product_TF = jnp.einsum(
            "TD,DF->TF", own_TD, w_DF.astype(x_TD.dtype), preferred_element_type=wide
        )
        return jnp.where(inside_T1, product_TF, out_TF), None

    out_TF = jnp.zeros((x_TD.shape[0], w_EDF.shape[2]), wide)
    out_TF, _ = jax.lax.scan(add_group, out_TF, (w_EDF, ends_E - group_sizes_E, ends_E))
    return out_TF.astype(x_TD.dtype)

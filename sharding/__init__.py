# SPDX-License-Identifier: Apache-2.0
"""Named meshes and partition rules: one letter a dim, tables of them, one plan."""

from sharding.alphabet import LETTERS
from sharding.arrays import (
    add_along,
    add_products,
    along,
    axes_of,
    constrain,
    einsum,
    gather,
    local,
    out_sharding,
    place_like,
    reduce_to_storage,
    spec_of,
)
from sharding.errors import ShardingError
from sharding.mesh import AXES, abstract_mesh, make_mesh, resolve_sizes
from sharding.placement import Placement
from sharding.plan import Plan, Row, plan
from sharding.report import format_table
from sharding.rules import COMPUTE, RESIDUAL, STORAGE, named_sharding, spec
from sharding.zigzag import check_length, to_zigzag

__all__ = [
    "AXES",
    "COMPUTE",
    "LETTERS",
    "RESIDUAL",
    "STORAGE",
    "Placement",
    "Plan",
    "Row",
    "ShardingError",
    "abstract_mesh",
    "add_along",
    "add_products",
    "along",
    "axes_of",
    "check_length",
    "constrain",
    "einsum",
    "format_table",
    "gather",
    "local",
    "make_mesh",
    "named_sharding",
    "out_sharding",
    "place_like",
    "plan",
    "reduce_to_storage",
    "resolve_sizes",
    "spec",
    "spec_of",
    "to_zigzag",
]

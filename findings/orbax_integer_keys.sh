#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# orbax-checkpoint 0.12.8, v1, with flax 0.12.12: layers 10 and 11 come before layer 2.
#
# Guess: what is saved as {"layers": {0: ..., 11: ...}}, which `nnx.to_pure_dict` makes
#   of an `nnx.List`, is loaded with the same keys, or at least in the same order.
# Seen: without a target, keys are loaded as strings and `jax.tree` sorts them as such:
#   0, 1, 10, 11, 2, ... All shapes are equal, so putting the leaves into the model's
#   structure raises nothing, and 10 of 12 layers hold another layer's weights. 10
#   layers would be right, which is what small tests have.
# For training: load into a target (`ocp.load(path, target)`), match leaves by path,
#   never by position; or stack layers in one array.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.6.0 \
  flax==0.12.12 orbax-checkpoint==0.12.8 || exit 2
cd "$folder"
export JAX_PLATFORMS=cpu

"$python" -I - <<'EOF'
import logging
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
from flax import nnx
from orbax.checkpoint import v1 as ocp

logging.disable(logging.ERROR)
warnings.simplefilter("ignore")


def misplaced(layers):
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        layers=nnx.List(
            [nnx.Linear(2, 2, use_bias=False, rngs=rngs) for _ in range(layers)]
        )
    )
    for n, layer in enumerate(model.layers):
        layer.kernel[...] = jnp.full((2, 2), float(n))
    params = nnx.to_pure_dict(nnx.state(model))
    path = pathlib.Path.cwd() / str(layers)
    ocp.save(path, params)
    leaves = jax.tree.leaves(ocp.load(path))
    found = jax.tree.unflatten(jax.tree.structure(params), leaves)["layers"]
    to_target = ocp.load(path, params)["layers"]
    assert all(to_target[n]["kernel"][0, 0] == n for n in range(layers))
    return [n for n in range(layers) if found[n]["kernel"][0, 0] != n]


few, many = misplaced(10), misplaced(12)
print(f"misplaced of 10 layers: {few}; of 12: {many}")
sys.exit(None if not few and many == list(range(2, 12)) else "changed")
EOF

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# jax 0.12.0.1: XLA's count of FLOPs does not grow with the number of layers.
#
# Guess: `compiled.cost_analysis()["flops"]` of a stack of layers under `jax.lax.scan`
#   is that of all layers, since the trip count is in the program.
# Seen: the body is counted once. 32 layers are 8.4 MFLOP by XLA, 268 by arithmetic, as
#   1 layer is; unrolled they are 268.
# For training: FLOPs, utilisation and rooflines of a scanned model come from a formula;
#   check it against the count of the same model unrolled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.6.0 || exit 2
cd "$folder"
export JAX_PLATFORMS=cpu

"$python" -I - <<'EOF'
import sys

import jax
import jax.numpy as jnp


def count(layers, unroll):
    def model(weights, x):
        step = lambda x, weight: (x @ weight, None)
        return jax.lax.scan(step, x, weights, unroll=unroll)[0]

    weights = jax.ShapeDtypeStruct((layers, 256, 256), jnp.float32)
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    cost = jax.jit(model).lower(weights, x).compile().cost_analysis()
    return cost["flops"] / (2 * 64 * 256 * 256)


one, scanned, unrolled = count(1, 1), count(32, 1), count(32, 32)
print(f"in layers: 1 {one:.2f}; 32 scanned {scanned:.2f}, unrolled {unrolled:.2f}")
sys.exit(None if scanned < 1.1 and unrolled > 31 else "changed")
EOF

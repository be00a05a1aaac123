#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# optax 0.2.8: Adafactor takes stacked layers for one matrix, and heads for none.
#
# Guess: `optax.adafactor` treats layers stacked in one array [L, D, F] as it treats L
#   arrays [D, F], and factors every large weight.
# Seen: clipping is by the RMS of the whole array. With the gradients of layers 1 to 3
#   times 100, layer 0, whose gradient is as before, is updated by 0.8 of what it was.
#   Only the two largest dims are factored, and only if both have 128: a weight of heads
#   [D=1024, N=16, H=64] keeps all 1,048,576 second moments, where [D, N H] keeps 2048.
# For training: scanning over layers changes the optimizer, not only the program; an
#   attention-heavy model saves little. Map the update over layers (`jax.vmap`), and
#   reshape heads to matrices around it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.6.0 \
  optax==0.2.8 || exit 2
cd "$folder"
export JAX_PLATFORMS=cpu

"$python" -I - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

tx = optax.adafactor(1e-2)
key = jax.random.key(0)
params = jax.random.normal(key, (4, 128, 128))
first = jax.random.normal(jax.random.fold_in(key, 1), params.shape)


def update_of_layer_0(others):
    state = tx.update(first, tx.init(params), params)[1]
    second = first.at[1:].multiply(others)
    update = tx.update(second, state, params)[0][0]
    return float(jnp.sqrt(jnp.mean(update**2)))


ratio = update_of_layer_0(100.0) / update_of_layer_0(1.0)
print(f"layer 0, by the gradients of the others: {ratio:.2f} of its update")


def kept(shape):
    state = tx.init(jnp.zeros(shape))[0]
    return sum(np.prod(leaf.shape) for leaf in (state.v_row, state.v_col, state.v)) - 1


heads, matrix = (1024, 16, 64), (1024, 1024)
print(f"moments kept: {heads} {kept(heads)}, {matrix} {kept(matrix)}")
same = ratio < 0.9 and kept(heads) > 1024**2 and kept(matrix) == 2048
sys.exit(None if same else "changed")
EOF

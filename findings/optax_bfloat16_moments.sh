#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# optax 0.2.8: Adam's second moment of bfloat16 parameters never falls.
#
# Guess: with bfloat16 parameters `optax.adam` keeps float32 moments, or noisy ones that
#   still follow the gradient.
# Seen: moments have the parameters' dtype, and 0.999, the decay of the second one,
#   rounds to 1 in bfloat16. The moment only rises, until an addition is lost. After
#   2000 gradients of 1 and 20000 of 0.01 it is 0.5 where float32 has 0.0001, and the
#   update 0.014 times the learning rate instead of 1.
# For training: gradients fall a hundredfold in long runs; the rate then falls with
#   them, without a word, and the loss curve looks like one that has converged. Keep the
#   state in float32 (initialise the optimizer with float32 parameters), or round it
#   stochastically.
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
import optax

tx = optax.scale_by_adam()
grads = jnp.concatenate([jnp.full((2000, 1), 1.0), jnp.full((20000, 1), 0.01)])


def last(dtype):
    def step(state, grad):
        update, state = tx.update(grad, state)
        return state, (state.nu[0], update[0])

    start = tx.init(jnp.zeros(1, dtype))
    nu, update = jax.lax.scan(step, start, grads.astype(dtype))[1]
    return float(nu[-1]), float(update[-1])


exact, kept = last(jnp.float32), last(jnp.bfloat16)
print("float32:  second moment %.5f, update %.3f" % exact)
print("bfloat16: second moment %.5f, update %.3f" % kept)
sys.exit(None if kept[0] > 0.1 and kept[1] < 0.05 < 0.9 < exact[1] else "changed")
EOF

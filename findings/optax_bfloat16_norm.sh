#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# optax 0.2.8: clipping by the global norm lets bfloat16 gradients through above it.
#
# Guess: `optax.global_norm` adds squares in float32, or at worst is off by a rounding,
#   0.4 %.
# Seen: each leaf's sum is rounded to bfloat16 and these are added in bfloat16. A sum
#   stalls at 256 to 512 times a leaf's: for 720 leaves of 256 normals it gives 362
#   instead of 430, and `clip_by_global_norm(1)` leaves a norm of 1.19. More leaves make
#   it worse.
# For training: a model whose layers are not stacked has hundreds of leaves. Cast
#   gradients to float32 before the clip, and log that norm.
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

keys = jax.random.split(jax.random.key(0), 720)
grads = [jax.random.normal(key, (256,)).astype(jnp.bfloat16) for key in keys]


def exact(leaves):
    return np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in leaves))


norm = float(optax.global_norm(grads))
clipped = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())[0]
print(f"norm {norm:.0f}, exactly {exact(grads):.0f}; clipped {exact(clipped):.2f}")
same = norm < 0.9 * exact(grads) and exact(clipped) > 1.1
sys.exit(None if same else "changed")
EOF

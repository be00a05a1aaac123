#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# jax 0.12.0.1: sampling from bfloat16 logits draws almost only the first tokens.
#
# Guess: `jax.random.categorical` samples from its logits whatever their dtype, up to a
#   rounding of each probability; a million bfloat16 normals are as many values as
#   bfloat16 has, with a few beyond 4.
# Seen: noise is drawn in the dtype asked for, from the 7 bits of a bfloat16 fraction.
#   With equal logits for 32768 tokens, 256 draws have a mean of 120 and none above 683,
#   where float32 logits give a mean of 16211: the largest noise has probability 1/128,
#   many tokens tie for it, and argmax takes the first. A million normals have 128
#   different values, from -2.9 to 2.6.
# For training: make logits float32 before sampling, at whatever dtype the model
#   computes; draw parameters and test inputs in float32 and cast. A test with bfloat16
#   normals never sees an outlier.
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
import numpy as np

key = jax.random.key(0)
means = {}
for dtype in (jnp.bfloat16, jnp.float32):
    ids = np.asarray(jax.random.categorical(key, jnp.zeros(32768, dtype), shape=(256,)))
    means[dtype] = ids.mean()
    print(f"{dtype.dtype}: mean token {ids.mean():.0f}, largest {ids.max()} of 32767")
normals = np.asarray(jax.random.normal(key, 1_000_000, jnp.bfloat16)).astype(np.float32)
values = len(np.unique(normals))
print(f"bfloat16 normals: {values} values, {normals.min():.2f} to {normals.max():.2f}")
same = means[jnp.bfloat16] < 1000 and means[jnp.float32] > 14000
same = same and values == 128 and np.abs(normals).max() < 3
sys.exit(None if same else "changed")
EOF

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ml_dtypes 0.6.0 with numpy 2.5.5: a NumPy sum of bfloat16 stops at 256.
#
# Guess: `array.sum()` and `.mean()` of bfloat16 add in float32, or pairwise, as for
#   NumPy's own float16; `jnp.sum` does.
# Seen: 4096 ones sum to 256 and have a mean of 0.0625; as float16, and with `jnp.sum`,
#   4096. The dtype comes from ml_dtypes, and NumPy adds its values one by one, rounding
#   each time.
# For training: weights read by safetensors, and arrays fetched from a device, are such
#   arrays. A mean, a norm or a checksum made of them on the host is wrong beyond 256
#   elements. Cast to float32 first (`.astype`, or `dtype=np.float32` in the call).
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

import jax.numpy as jnp
import ml_dtypes
import numpy as np

ones = np.ones(4096, ml_dtypes.bfloat16)
half, device = np.ones(4096, np.float16).sum(), jnp.sum(jnp.asarray(ones))
print(f"bfloat16 {ones.sum()}, mean {ones.mean()}; float16 {half}; jnp {device}")
cast = ones.sum(dtype=np.float32)
print(f"with dtype=np.float32 {cast}")
same = ones.sum() == 256 and half == device == cast == 4096
sys.exit(None if same else "changed")
EOF

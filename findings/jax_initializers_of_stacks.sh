#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# jax 0.12.0.1: the more layers a stack has, the smaller its initial weights.
#
# Guess: `jax.nn.initializers.lecun_normal()` of a stack [L, D, F] gives each layer the
#   scale of a [D, F] matrix, D**-0.5; of heads [D, N, H] too.
# Seen: all dims but the last two count as a receptive field, as of a convolution. 16
#   layers of 512 have 0.25 times that deviation, a weight [512, 8, 64] 0.35 times; 1
#   layer is right.
# For training: scanning over layers, or writing heads as a dim of their own, starts
#   another run than the loop over matrices did. Initialise one layer under `jax.vmap`,
#   or name `batch_axis`, `in_axis` and `out_axis`.
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
from jax.nn.initializers import lecun_normal

key = jax.random.key(0)


def scale(shape, **axes):
    return float(lecun_normal(**axes)(key, shape).std()) * 512**0.5


seen = [scale((1, 512, 512)), scale((16, 512, 512)), scale((512, 8, 64))]
named = [
    scale((16, 512, 512), batch_axis=0),
    scale((512, 8, 64), in_axis=0, out_axis=(1, 2)),
]
print("times D**-0.5: 1 layer %.2f, 16 layers %.2f, heads %.2f" % tuple(seen))
print("with axes named: 16 layers %.2f, heads %.2f" % tuple(named))
same = abs(seen[1] - 0.25) < 0.02 and seen[2] < 0.4
same = same and all(abs(x - 1) < 0.05 for x in (seen[0], *named))
sys.exit(None if same else "changed")
EOF

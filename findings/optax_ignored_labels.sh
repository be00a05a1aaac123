#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# optax 0.2.8: the label -100 is a token, the 100th from the end.
#
# Guess: `softmax_cross_entropy_with_integer_labels` ignores -100, which is what data
#   prepared for PyTorch or Hugging Face masks targets with, or gives NaN for it.
# Seen: it indexes the logits as Python does. With 512 tokens, -100 is scored as token
#   412: a finite loss, and a gradient that teaches token 412 wherever nothing should be
#   learnt. Labels above the vocabulary, and -100 in a vocabulary below 100, give NaN.
# For training: a loss that looks sane says nothing about the mask. Pass `where=` or
#   weights, and refuse labels outside of 0 .. V - 1 where data is read.
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

logits = jnp.zeros((1, 512)).at[0, 412].set(3.0)
loss = lambda logits, label: jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([label]))
)
masked, scored, above = loss(logits, -100), loss(logits, 412), loss(logits, 512)
taught = int(jnp.argmin(jax.grad(loss)(logits, -100)))
print(f"label -100: {masked:.4f}; 412: {scored:.4f}; 512: {above:.4f}")
print(f"the gradient of label -100 raises token {taught}")
sys.exit(None if masked == scored and taught == 412 and jnp.isnan(above) else "changed")
EOF

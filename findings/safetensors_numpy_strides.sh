#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# safetensors 0.8.0 with numpy 2.5.5: a transposed array is saved with wrong numbers.
#
# Guess: `safetensors.numpy.save_file` writes the numbers of an array, whatever its
#   strides, or refuses one that is not contiguous, as `safetensors.torch` does.
# Seen: shape and memory are written as they are: a 3 x 4 array that is the transpose of
#   another comes back as 3 x 4 with the numbers in the order of memory. No error, no
#   warning; the torch side raises on such a tensor.
# For training: exports transpose most weights (in, out to out, in). The file has the
#   right names and shapes, and loads everywhere. Call np.ascontiguousarray first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  safetensors==0.8.0 numpy==2.5.5 || exit 2
cd "$folder"

"$python" -I - <<'EOF'
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

weight = np.arange(12, dtype=np.float32).reshape(4, 3)
save_file({"kernel": weight.T}, "model.safetensors")
found = load_file("model.safetensors")["kernel"]
print("saved:", weight.T.tolist())
print("read: ", found.tolist())
same_shape = found.shape == weight.T.shape
in_memory = np.array_equal(found.ravel(), weight.ravel())
sys.exit(None if same_shape and in_memory else "changed")
EOF

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: scripts/test_oldest.sh [ARGUMENTS of pytest]
# Runs the tests of the kernels and of the steps that are compiled for GPUs with the
# oldest jax that is supported, in .venv/oldest: XLA, Mosaic and ptxas come with jax, and
# what one version compiles well another may not. Without arguments: all of them.
set -euo pipefail
cd "$(dirname "$0")/.."

jax=0.11.2 folder=.venv/oldest
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
if [ ! -e "$folder/done" ]; then
  echo "installing jax $jax and the development tools into $folder ..."
  "${PYTHON:-python3.12}" -m venv "$folder"
  grep -v '^jax' constraints.txt >"$folder/constraints.txt"
  sed "s/^\(jax-.*\)==.*/\1==$jax/" scripts/cuda_toolchain.txt >"$folder/toolchain.txt"
  "${pip[@]}" --constraint "$folder/constraints.txt" \
    --editable '.[dev]' "jax==$jax" "jaxlib==$jax"
  "${pip[@]}" --no-deps --target "$folder/cuda" -r "$folder/toolchain.txt"
  touch "$folder/done"
fi

if [ $# -eq 0 ]; then
  set -- tests/test_pallas_kernels_*.py tests/test_kernels.py tests/test_offline*.py \
    tests/test_step_offline.py tests/test_step_kernels.py tests/test_models_mlp.py \
    tests/test_gpuflags.py
fi
PALLAS_KERNELS_CUDA=$PWD/$folder/cuda exec "$folder/bin/python" -m pytest -q -n 2 "$@"

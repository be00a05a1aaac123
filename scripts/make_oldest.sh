#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: scripts/make_oldest.sh PYTHON VERSION
# Makes .venv/oldest anew with the given Python: the development tools at the versions of
# constraints.txt, but jax of that version, and in .venv/oldest/cuda what compiles for
# NVIDIA GPUs with it.
set -euo pipefail
if [ $# -ne 2 ]; then
  sed -n '3,6p' "$0" >&2
  exit 2
fi
python=$1 jax=$2 folder=.venv/oldest

echo "installing jax $jax and the development tools into $folder ..."
rm -rf "$folder"
"$python" -m venv "$folder"
grep -v '^jax' constraints.txt >"$folder/constraints.txt"
sed "s/^\(jax-.*\)==.*/\1==$jax/" scripts/cuda_toolchain.txt >"$folder/toolchain.txt"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" --constraint "$folder/constraints.txt" \
  --editable '.[dev]' "jax==$jax" "jaxlib==$jax"
"${pip[@]}" --no-deps --target "$folder/cuda" -r "$folder/toolchain.txt"

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: scripts/make_venv.sh PYTHON TARGET
# Makes .venv with the given Python, if it is not there, and installs TARGET into it,
# which is '.' with or without extras, at the versions of constraints.txt.
set -euo pipefail
if [ $# -ne 2 ]; then
  sed -n '3,5p' "$0" >&2
  exit 2
fi
python=$1 target=$2

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
  echo "error: jaxllm needs Python 3.12 or newer, and '$python' is" \
    "$("$python" --version 2>&1 || true); give one with PYTHON=/path/to/python3.12." >&2
  exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing $target into .venv ..."
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
  --constraint constraints.txt --editable "$target"

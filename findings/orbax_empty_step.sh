#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# orbax-checkpoint 0.12.8, v1: an empty folder named by a number is the latest step.
#
# Guess: `Checkpointer.latest` is the newest step that was saved whole: saves are
#   written under another name and renamed, and leave a file that says so.
# Seen: with steps 10 and 20 saved and an empty folder 30 beside them, latest is 30,
#   `checkpoints` lists it, and loading the latest raises KeyError. 20 is not tried.
# For training: an interrupted copy between file systems, or a disk that was full,
#   leaves such a folder, and a job that resumes from the latest then fails at every
#   start. Look for the parts of a whole step before Orbax does, and set others aside.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.6.0 \
  orbax-checkpoint==0.12.8 || exit 2
cd "$folder"
export JAX_PLATFORMS=cpu

"$python" -I - <<'EOF'
import logging
import pathlib
import sys

import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

logging.disable(logging.ERROR)
folder = pathlib.Path.cwd() / "run"
with ocp.training.Checkpointer(folder) as checkpointer:
    for step in (10, 20):
        checkpointer.save(step, {"w": jnp.ones(2)})
(folder / "30").mkdir()
with ocp.training.Checkpointer(folder) as checkpointer:
    latest = checkpointer.latest.step
    try:
        checkpointer.load()
        loaded = "loads"
    except KeyError:
        loaded = "raises KeyError"
print(f"latest step {latest}; loading it {loaded}")
sys.exit(None if latest == 30 and loaded == "raises KeyError" else "changed")
EOF

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# orbax-checkpoint 0.12.8, v1: a run that was taken back to an earlier step saves
# nothing.
#
# Guess: after loading step 10 of a run that has 10, 20 and 30, saving step 15 writes
#   it, or raises as saving step 20 again does.
# Seen: `save(15)` returns False, without a warning, and writes nothing; so do all steps
#   up to the latest that is there. Step 20 raises StepAlreadyExistsError.
# For training: going back after a spike is what checkpoints are for. Unless the return
#   value is looked at, hours of the second attempt are unsaved, and a restart picks up
#   the first attempt's step 30. Remove or rename later steps when going back.
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
import warnings

import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

logging.disable(logging.ERROR)
warnings.simplefilter("ignore")
with ocp.training.Checkpointer(pathlib.Path.cwd() / "run") as checkpointer:
    for step in (10, 20, 30):
        checkpointer.save(step, {"w": jnp.full(2, step)})
    state = checkpointer.load(10)
    saved = {step: checkpointer.save(step, state) for step in (11, 15, 29)}
    try:
        checkpointer.save(20, state)
        again = "is saved"
    except ocp.training.errors.StepAlreadyExistsError:
        again = "raises"
    found = [each.step for each in checkpointer.checkpoints]
print(f"saved {saved}; 20 {again}; steps {found}")
same = not any(saved.values()) and again == "raises" and found == [10, 20, 30]
sys.exit(None if same else "changed")
EOF

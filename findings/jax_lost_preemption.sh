#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# jax 0.12.0.1: a resumed run never hears a SIGTERM that came while it restored.
#
# Guess: `multihost_utils.reached_preemption_sync_point(step)` is true at the next step
#   that is checked after a SIGTERM, whenever that came; Orbax's preemption policy
#   relies on it.
# Seen: it is true only for step == first agreed step. A notice that arrives before the
#   first call agrees on step 1. A run that starts at step 0 stops at 1; a run that
#   resumes at 100 checks 100, 101, ... and is never told, for the rest of its life.
# For training: restoring and compiling a large model takes minutes, in which a cluster
#   does send its notice. As soon as processes are connected, call the function with
#   step 1, which tells of notices until then, and with the first step, after which one
#   that comes while restoring is told at step 101; or agree on a stop by a sum of your
#   own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.6.0 || exit 2
cd "$folder"
export JAX_PLATFORMS=cpu

cat >run.py <<'EOF'
import os
import signal
import socket
import sys
import time

import jax
from jax.experimental import multihost_utils

resumed_at, early = int(sys.argv[1]), sys.argv[2] == "before_first_step"
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = "127.0.0.1:%d" % free.getsockname()[1]
jax.distributed.initialize(address, num_processes=1, process_id=0)
if early:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)  # the service looks for notices once a second
told = None
for step in range(resumed_at, resumed_at + 20):
    if not early and step == resumed_at + 3:
        os.kill(os.getpid(), signal.SIGTERM)
    if multihost_utils.reached_preemption_sync_point(step):
        told = step
        break
    time.sleep(0.3)
print(told)
jax.distributed.shutdown()
EOF
told() { "$python" -I run.py "$@" 2>run.log | tail -n 1; }
new=$(told 0 before_first_step)
resumed=$(told 100 before_first_step)
later=$(told 100 at_step_103)
echo "SIGTERM before the first step: run from 0 stops at $new, from 100 at $resumed"
echo "SIGTERM at step 103: run from 100 stops at $later"
[ "$new" = 1 ] && [ "$resumed" = None ] && [ "$later" != None ] || {
  echo changed >&2
  exit 1
}

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# jax 0.12.0.1: two jobs bind one coordinator port, and a process joins the other job.
#
# Guess: the coordination service of the second job on a node fails, because its port is
#   in use, or a process says which job it belongs to.
# Seen: both services start without a word, as the port is opened to be shared, and the
#   kernel gives each connection to either. Process 1 of job A becomes process 1 of job
#   B: all of B's processes are there, and `jax.distributed.initialize` returns. So it
#   went on 10 of 13 ports that were tried.
# For training: after a requeue, or with a port computed modulo a small number, a process
#   trains with the settings and the data position of another job. Take the port from a
#   hash of the job's name, and compare something of the job's own right after the start.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill -KILL $(jobs -p) 2> /dev/null || true; rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  jax==0.12.0.1 || exit 2
cd "$folder"

cat > start.py <<'EOF'
import sys
import time

import jax
from jax._src import distributed

port, process, job = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
client = distributed.global_state.client
if process == "0":
    client.key_value_set("job", job)
joined = client.blocking_key_value_get("job", 20_000)
print(f"process {process} of job {job} is in job {joined}", flush=True)
client.wait_at_barrier("end", 20_000)
EOF
start() { JAX_PLATFORMS=cpu exec "$python" -I start.py "$@" 2> /dev/null; }

mixed=no
for number in $(seq 10); do
  port=$("$python" -c 'import socket
s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
  start "$port" 0 A > /dev/null & first=$!
  sleep 4
  start "$port" 0 B > /dev/null & second=$!
  sleep 4
  start "$port" 1 A > joined.txt & third=$!
  for _ in $(seq 20); do
    [ -s joined.txt ] && break
    sleep 1
  done
  echo "port $number: $(cat joined.txt)"
  kill -KILL "$first" "$second" "$third" || true
  wait || true
  grep -q "of job A is in job B" joined.txt && mixed=yes && break
done 2> /dev/null
[ "$mixed" = yes ] || {
  echo changed
  exit 1
}

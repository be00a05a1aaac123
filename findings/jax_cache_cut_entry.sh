#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# jax 0.12.0.1: a compilation-cache entry that is cut off is never written anew.
#
# Guess: where an entry of the persistent compilation cache cannot be read, the program
#   is compiled and the entry replaced, so that the next start is fast again.
# Seen: each start warns, compiles, and leaves the file as it is: an entry is written
#   only where no file of its name exists. Entries are not written atomically either, so
#   a killed process or a full disk leaves such files.
# For training: after one kill at the wrong moment every later start of a run compiles
#   for minutes. Remove entries that do not decompress.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  jax==0.12.0.1 || exit 2
cd "$folder"

cat > start.py <<'EOF'
import jax
import jax.numpy as jnp

jax.config.update("jax_compilation_cache_dir", "cache")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
misses = []
jax.monitoring.register_event_listener(
    lambda event, **_: misses.append(event) if event.endswith("cache_misses") else None
)
jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.ones(8)).compile()
print("compiled" if misses else "read")
EOF
start() { JAX_PLATFORMS=cpu "$python" -I start.py 2> warning.txt | tail -1; }

first=$(start)
second=$(start)
entry=$(ls -S cache/jit__lambda*-cache | head -1)
whole=$(stat -c %s "$entry")
truncate -s 100 "$entry"
third=$(start)
grep -qi "error reading" warning.txt && warned=yes || warned=no
fourth=$(start)
after=$(stat -c %s "$entry")
echo "starts: $first, $second, cut off, $third, $fourth"
echo "entry: $whole bytes, cut to 100, after two more starts $after; warned: $warned"
[ "$second $third $fourth $after $warned" = "read compiled compiled 100 yes" ] || {
  echo changed
  exit 1
}

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# jax 0.12.0.1 with grain 0.2.18: a transfer guard does not see Grain's threads.
#
# Guess: inside `with jax.transfer_guard("disallow")` an implicit transfer of the input
#   pipeline raises, as one in the loop does.
# Seen: the context is of one thread. Grain calls `map` functions in prefetch threads,
#   and `jnp.sin` of a NumPy array passes there; the same call in the thread of the loop
#   raises, and so does `jax.make_array_from_callback`, whose name sounds explicit. Set
#   by `jax.config.update("jax_transfer_guard", "disallow")` the guard is in every
#   thread.
# For training: a test that wraps its loop in the context cannot fail for what the
#   pipeline does. Set the config, or enter the context inside the mapped function.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.6.0 \
  grain==0.2.18 || exit 2
cd "$folder"
export JAX_PLATFORMS=cpu

"$python" -I - <<'EOF'
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np


def load(step):
    return jnp.sin(np.full(4, step, np.float32))  # from the host, implicitly


def passes(function):
    try:
        function()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def batches():
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.range(4).map(load).to_iter_dataset(options))


def from_callback():
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    jax.make_array_from_callback((4,), whole, lambda index: np.ones(4)[index])


with jax.transfer_guard("disallow"):
    seen = {
        "in the loop": passes(lambda: load(0)),
        "from a callback": passes(from_callback),
        "in Grain's thread": passes(lambda: next(batches())),
    }
jax.config.update("jax_transfer_guard", "disallow")
seen["in Grain's thread, by config"] = passes(lambda: next(batches()))
for where, passed in seen.items():
    print(where, "passes" if passed else "raises")
sys.exit(None if list(seen.values()) == [False, False, True, False] else "changed")
EOF

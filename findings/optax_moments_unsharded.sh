#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# optax 0.2.8 with jax 0.12.0.1: `jit(optimizer.init)` puts whole moments on one device.
#
# Guess: Adam's moments lie where the parameters lie, compiled or not.
# Seen: on a mesh of 8 devices with Auto axes, parameters are cut in 8. `optimizer.init`
#   run eagerly gives moments cut in 8; the same under `jax.jit` gives them whole, on
#   device 0 alone, and with `jax.set_mesh` whole on each device: zeros take nothing but
#   a shape from the parameters, so there is nothing to propagate.
# For training: compiling the initialisation, the usual way not to hold a model twice,
#   makes the moments 8 times as large a device. Pass `out_shardings`, or use Explicit
#   axes, where the type of a parameter carries its sharding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.6.0 \
  optax==0.2.8 || exit 2
cd "$folder"
export JAX_PLATFORMS=cpu

"$python" -I - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import optax

jax.config.update("jax_num_cpu_devices", 8)


def rows_of_a_device(init, axis_type, in_context):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(axis_type,))
    cut = jax.NamedSharding(mesh, jax.P("fsdp"))
    params = jax.device_put(jnp.ones((1024, 16)), cut)
    if in_context:
        with jax.set_mesh(mesh):
            state = init(params)
    else:
        state = init(params)
    mu = state[0].mu
    return mu.addressable_shards[0].data.shape[0], len(mu.addressable_shards)


init = optax.adam(1e-3).init
auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
seen = {
    "Auto, eager": rows_of_a_device(init, auto, False),
    "Auto, jit": rows_of_a_device(jax.jit(init), auto, False),
    "Auto, jit in set_mesh": rows_of_a_device(jax.jit(init), auto, True),
    "Explicit, jit": rows_of_a_device(jax.jit(init), explicit, True),
}
for how, (rows, devices) in seen.items():
    print(f"{how}: {rows} of 1024 rows on each of {devices}")
expected = [(128, 8), (1024, 1), (1024, 8), (128, 8)]
sys.exit(None if list(seen.values()) == expected else "changed")
EOF

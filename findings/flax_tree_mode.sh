#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# flax 0.12.12: a switch of the whole process drops the layers from sharding metadata.
#
# Guess: `nnx.set_graph_mode(False)`, which any imported library may call, changes how
#   modules are traversed, not what an explicit argument means.
# Seen: in tree mode `nnx.vmap` ignores `transform_metadata`, without a warning. Stacked
#   kernels of rank 3 then have `out_sharding` ("embed", "mlp") instead of ("layers",
#   "embed", "mlp"): layers are cut by the rule for embed, embed by that for mlp, where
#   the sizes happen to divide.
# For training: a model may lie otherwise on its mesh because of an import elsewhere.
#   Check the rank of metadata against the array, and keep axes of your own, made by
#   functions that do not depend on the mode.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.6.0 \
  flax==0.12.12 || exit 2
cd "$folder"
export JAX_PLATFORMS=cpu

"$python" -I - <<'EOF'
import sys
import warnings

from flax import nnx

warnings.simplefilter("error")
init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))


def make(rngs):
    return nnx.Linear(4, 8, kernel_init=init, rngs=rngs)


found = []
for graph in (True, False):
    nnx.set_graph_mode(graph)
    metadata = {nnx.PARTITION_NAME: "layers"}
    with nnx.use_eager_sharding(False):
        stacked = nnx.vmap(make, transform_metadata=metadata)(nnx.Rngs(0).split(3))
    found.append(stacked.kernel.get_metadata()["out_sharding"])
    print(f"graph mode {graph}: {stacked.kernel.shape} {found[-1]}")
same = found == [("layers", "embed", "mlp"), ("embed", "mlp")]
sys.exit(None if same else "changed")
EOF

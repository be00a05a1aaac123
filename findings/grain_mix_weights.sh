#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# grain 0.2.18: a mixture of 0.7 and 0.3 is one of 0.6997 and 0.3003.
#
# Guess: `MapDataset.mix` of 7000 and 3000 rows with weights 0.7 and 0.3 shows each row
#   once in 10000.
# Seen: weights are rounded. The mixture ends after 9990 rows; repeated, 10000 rows have
#   3 rows twice and 3 not at all, and each further epoch shifts by as many.
# For training: epochs counted in rows of the mixture drift from those of its parts, and
#   "each token once" is not true. Draw by whole numbers where that matters.
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
import collections
import sys

import grain

parts = grain.MapDataset.range(7000), grain.MapDataset.range(7000, 10000)
once = grain.MapDataset.mix(parts, weights=[0.7, 0.3])
endless = grain.MapDataset.mix([part.repeat() for part in parts], weights=[0.7, 0.3])
times = collections.Counter(endless[n] for n in range(10000))
twice = sum(count > 1 for count in times.values())
print(f"{len(once)} rows; of 10000 repeated: {twice} twice, {10000 - len(times)} never")
sys.exit(None if len(once) == 9990 and len(times) < 10000 else "changed")
EOF

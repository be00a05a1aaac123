#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# grain 0.2.18: the second epoch of seed 0 is the first epoch of seed 1.
#
# Guess: `shuffle(seed=0)` and `shuffle(seed=1)` are independent, in every epoch.
# Seen: an epoch's order is that of the seed plus the epoch's number. Of 10000 rows, all
#   are at the same place in epoch 1 of seed 0 and in epoch 0 of seed 1. With
#   `.seed(0).shuffle()` they are not: that way derives a seed first.
# For training: runs with seeds 0, 1 and 2, repeated to measure noise, read the same
#   orders, shifted by an epoch; parts of a mixture with neighbouring seeds move in
#   step. Derive seeds, by `np.random.SeedSequence` or `.seed()`.
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

ROWS = 10000


def order(dataset, epoch):
    return [dataset[epoch * ROWS + row] for row in range(ROWS)]


def shuffled(seed):
    return grain.MapDataset.range(ROWS).shuffle(seed=seed).repeat()


def derived(seed):
    return grain.MapDataset.range(ROWS).seed(seed).shuffle().repeat()


shares = []
for make in (shuffled, derived):
    pairs = zip(order(make(0), 1), order(make(1), 0), strict=True)
    shares.append(sum(a == b for a, b in pairs) / ROWS)
    print(f"{make.__name__}: {shares[-1]:.2%} of rows at the same place")
sys.exit(None if shares[0] == 1 and shares[1] < 0.01 else "changed")
EOF

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# grain 0.2.18 with orbax-checkpoint 0.12.8: a resumed pipeline loses a row.
#
# Guess: an iterator saved and loaded by Orbax continues exactly, as Grain promises for
#   its state.
# Seen: `ConcatThenSplitIterDataset` marks "nothing left over of the last document" by
#   the tuple (-1, -1). Grain writes its state as JSON, where it becomes a list, and a
#   list equals no tuple: the mark is then read as a piece of a document. Of 33
#   positions in 60 documents, 4 then continue with other rows, without an error: those
#   at which no document is half read; from one of them, 3 rows follow instead of 4. In
#   memory the same state is right.
# For training: rare with long documents, common with short ones, and never an error.
#   Make values of `remainder_slices` tuples before `set_state`, or let a batch be a
#   function of the step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.6.0 \
  grain==0.2.18 orbax-checkpoint==0.12.8 || exit 2
cd "$folder"
export JAX_PLATFORMS=cpu

"$python" -I - <<'EOF'
import json
import logging
import pathlib
import sys

import grain
import numpy as np
from orbax.checkpoint import v1 as ocp

logging.disable(logging.ERROR)
lengths = np.random.default_rng(0).integers(10, 60, size=60)
documents = [{"ids": np.full(length, n)} for n, length in enumerate(lengths)]
options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
dataset = grain.experimental.ConcatThenSplitIterDataset(
    grain.MapDataset.source(documents).to_iter_dataset(options),
    length_struct={"ids": 64},
)


def rows(iterator):
    return [row["ids"].tolist() for row in iterator]


def at(position):
    iterator = iter(dataset)
    for _ in range(position):
        next(iterator)
    return iterator


def resumed(state):
    iterator = iter(dataset)
    iterator.set_state(state)
    return rows(iterator)


whole = rows(iter(dataset))
states = [at(position).get_state() for position in range(len(whole))]
tail = list(enumerate(states))
in_memory = [n for n, state in tail if resumed(state) != whole[n:]]
as_json = [n for n, s in tail if resumed(json.loads(json.dumps(s))) != whole[n:]]
print(f"{len(whole)} positions; wrong in memory {in_memory}, after JSON {as_json}")

position = as_json[-1]
checkpointer = ocp.training.Checkpointer(pathlib.Path.cwd() / "run")
checkpointer.save_checkpointables(position, {"data": at(position)})
loaded = iter(dataset)
checkpointer.load_checkpointables(position, {"data": loaded})
checkpointer.close()
found = rows(loaded)
print(f"by Orbax from {position}: same rows {found == whole[position:]}, of them "
      f"{len(found)} instead of {len(whole) - position}")
same = not in_memory and len(as_json) > 1 and found != whole[position:]
sys.exit(None if same else "changed")
EOF

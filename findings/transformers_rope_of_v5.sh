#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# transformers 5.24.0 and 4.57.6: the older one loses RoPE's theta and scaling.
#
# Guess: a config.json that version 5 saves is read by version 4 with the same settings,
#   or refused: it names its version.
# Seen: version 5 writes theta and scaling as `rope_parameters` alone. Version 4 keeps
#   that key without reading it, and takes `rope_theta` 10000 and no scaling, which are
#   its defaults: no error, no warning. Models whose theta is the default do not show it.
# For training: a model that was trained on version 5, or exported in its form, is
#   evaluated or served on version 4 with other positions. Write `rope_theta` and
#   `rope_scaling` beside `rope_parameters`: both versions then read the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.6; do
  "${PYTHON:-python3.12}" -m venv "$folder/$version" || exit 2
  "$folder/$version/bin/python" -m pip install --quiet --no-compile \
    --disable-pip-version-check "transformers==$version" || exit 2
done
cd "$folder"
export HF_HUB_OFFLINE=1

5.24.0/bin/python -I - <<'EOF' 2> /dev/null
from transformers import LlamaConfig

LlamaConfig(
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
).save_pretrained("model")
EOF

4.57.6/bin/python -I - <<'EOF' 2> /dev/null
import sys

from transformers import AutoConfig

config = AutoConfig.from_pretrained("model")
print("saved: theta 500000, scaling llama3")
print("read:  theta", config.rope_theta, "scaling", config.rope_scaling)
lost = config.rope_theta == 10_000.0 and config.rope_scaling is None
sys.exit(None if lost else "changed")
EOF

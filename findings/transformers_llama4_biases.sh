#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# transformers 5.24.0 and 4.57.6: the older one drops Llama 4's biases of attention.
#
# Guess: `attention_bias` of a config.json means the same to both versions, as it does
#   for Llama, Qwen and Granite: the configuration class has an argument of that name.
# Seen: version 4.57.6 sets it to false whatever is given, without a word. Of a model
#   that has the biases it then leaves them out with a warning about unused weights;
#   logits of a small random one are off by 3.
# For training: fine-tuning that adds biases, or a model of one's own in this family,
#   gives other results where it is served. Compare the settings that were read with
#   those in the file. gpt-oss is alike: 4.57.6 clamps at 7 whatever `swiglu_limit` says.
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
from transformers import Llama4TextConfig

Llama4TextConfig(num_hidden_layers=2, attention_bias=True).save_pretrained("model")
EOF
for version in 5.24.0 4.57.6; do
  "$version/bin/python" -I - <<'EOF' 2> /dev/null >> read.txt
from transformers import AutoConfig, __version__

config = AutoConfig.from_pretrained("model")
print(f"saved with attention_bias true; {__version__} reads {config.attention_bias}")
EOF
done
cat read.txt
grep -q "5.24.0 reads True" read.txt && grep -q "4.57.6 reads False" read.txt || {
  echo changed
  exit 1
}

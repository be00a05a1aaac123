#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: scripts/gpu_suite.sh PART [OUTPUT]
# Runs one part of what needs a GPU, in less than 10 minutes, and writes into OUTPUT
# (the variable OUT, or else pallas_kernels/bench/results). The exit status is that of the
# part. PYTHON names the interpreter: it needs jax with its CUDA plugin, pytest, and for
# the last part what training needs. Nothing is installed and no setting of the GPU is
# touched. Every part ends by itself, keeps what it has if it is killed, and survives
# kernels that hang or fault.
#
# In this order where GPU minutes are few; LIMIT is the seconds after which a part begins
# nothing more, and the minutes in brackets are those of its default:
#   scripts/gpu_suite.sh kernels     (9)   every case beside every peer, with ceilings; a
#                                          cheap case of each kind first
#   scripts/gpu_suite.sh step        (9)   whole steps, each kernel on and off, torch;
#                                          where their time goes; device description,
#                                          autotuning, memory
#   scripts/gpu_suite.sh tune        (9)   other tiles, the table of tiles; OPERATIONS
#                                          and PART name some: OPERATIONS=attention first
#   scripts/gpu_suite.sh tests       (8)   pytest -m gpu; TESTS selects, as pytest -k
#   scripts/gpu_suite.sh quickstart  (4)   trains and samples with configs/quickstart_gpu
# PART takes words that names of cases have, with commas between them. In 15 minutes, of
# which a machine takes one to start: LIMIT=220 for kernels, 300 for step, 200 for tune.
# After each: read OUTPUT/*.md, commit the results and what they changed in
# pallas_kernels/devices; `compare` says what a real device description changes.
#
# Before, on a machine with a package index, for peers and for the quickstart:
#   scripts/gpu_suite.sh wheels [FOLDER]   downloads them into .whl (11 MB), to be
#                                          carried along; every part unpacks .whl
set -euo pipefail
cd "$(dirname "$0")/.."

part=${1:-help} out=${2:-${OUT:-pallas_kernels/bench/results}}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
read -ra operations <<<"${OPERATIONS:-}"

# Wheels that were carried along; what Tokamax imports of xprof only times its own runs.
if [ -d .whl ] && [ "$part" != wheels ]; then
  site=${TMPDIR:-/tmp}/gpu_suite_site
  if [ ! -d "$site" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile \
      --no-cache-dir --target "$site" .whl/*.whl
    mkdir -p "$site/xprof/cli/tools"
    touch "$site/xprof/cli/tools/get_kernel_stats_tool.py"
  fi
  PYTHONPATH=$PYTHONPATH:$site
fi

bench() {
  "$python" -m pallas_kernels.bench --output "$out" "$@"
}

case $part in
  kernels)
    nvidia-smi || true
    bench --seconds "${LIMIT:-520}" ${PART:+--part "$PART"} "${operations[@]}"
    ;;
  tune)
    bench --tune --no_peers --seconds "${LIMIT:-500}" --case_seconds 4 \
      ${PART:+--part "$PART"} "${operations[@]}"
    ;;
  step)
    mkdir -p "$out"
    "$python" scripts/bench_step.py --seconds "${LIMIT:-420}" --output "$out"
    # Twice the rows: does the prediction of memory hold where it matters?
    "$python" scripts/bench_step.py --seconds 100 --output "$out" \
      --stem step_4_rows --batch 4 --arms mosaic
    ;;
  tests)
    mkdir -p "$out"
    JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false \
      timeout 560 "$python" -m pytest --noconftest -n 4 -m gpu -rA --timeout=400 \
      -p no:benchmark \
      ${TESTS:+-k "$TESTS"} tests/kernels/test_gpu.py 2>&1 | tee "$out/tests.log"
    ;;
  quickstart)
    config=configs/quickstart_gpu.py workdir=runs/quickstart_gpu
    "$python" -m jaxllm.tokenize --input python:stdlib --output data/stdlib \
      --tokenizer bpe:4096 --holdout 0.05
    "$python" -m jaxllm.train --config $config --workdir $workdir --overwrite
    "$python" -m jaxllm.evaluate --workdir $workdir
    "$python" -m jaxllm.generate --workdir $workdir --prompt "def read" \
      --max_tokens 120 --temperature 0.7 --top_p 0.9
    mkdir -p "$out"
    cp $workdir/metrics.jsonl "$out/quickstart_metrics.jsonl"
    ;;
  compare)
    diff <(grep -v '^#' pallas_kernels/devices/nvidia_h200.txtpb) \
      "$out/target_config.pbtxt"
    ;;
  wheels)
    folder=${2:-.whl}
    "$python" -m pip download --quiet --no-deps --only-binary=:all: \
      --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
      --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$folder" \
      grain==0.2.18 array-record==0.8.6 liger-kernel==0.8.5 tokamax==0.0.17 \
      einshape immutabledict jaxtyping pydantic==2.14.3 pydantic-core==2.50.4 \
      annotated-types typing-inspection qwix tensorboardx tqdm typeguard==2.13.3 \
      wadler-lindig
    ls -l "$folder"
    ;;
  *)
    sed -n '3,29p' "$0"
    exit 2
    ;;
esac

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# jax 0.12.0.1, compiled for an H200: fp8 products that share an input become one in
# bfloat16.
#
# Guess: if XLA makes an fp8 matmul of `x8 * scale_x @ w8 * scale_w`, it makes three of
#   the projections of query, key and value, which are three times that.
# Seen: XLA's dot merger first joins products of one input into one, and the fp8 rewrite
#   does not know the joined form. One product is `__cublas$lt$matmul$f8`; two or three
#   are one `__cublas$lt$matmul` of bfloat16, behind passes that dequantise. With
#   `--xla_gpu_dot_merger_threshold_mb=0`, or scales applied after the product, all are
#   in fp8. Nothing is said, and results differ only by rounding.
# For training: attention's projections run at half the rate, and a test of an MLP alone
#   does not see it: its products are too large to be merged. Count the calls in the
#   compiled step. (Compiled for a described device, without a GPU; Triton's matmuls are
#   off, as they are chosen by timing on a real one.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
install() {
  "$python" -m pip install -q --no-compile --disable-pip-version-check "$@" || exit 2
}
install jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.6.0
install --no-deps jax-cuda13-plugin==0.12.0.1 jax-cuda13-pjrt==0.12.0.1 \
  nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88
cd "$folder"
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_enable_triton_gemm=false

"$python" -I - <<'EOF'
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

H200 = '''
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150109880320
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
'''
described = topologies.get_topology_desc(
    "described", platform="cuda", target_config=H200, topology="1x1x1"
)
device = jax.sharding.SingleDeviceSharding(described.devices[0])
IN_FP8, IN_BFLOAT16 = "__cublas$lt$matmul$f8", "__cublas$lt$matmul"


def product(x, w):
    dims = ((1,), (1,)), ((), ())
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.bfloat16)


def scaled_before(x, scale, weights, scales):
    x = x.astype(jnp.bfloat16) * scale
    pairs = zip(weights, scales, strict=True)
    return [product(x, w.astype(jnp.bfloat16) * s) for w, s in pairs]


def scaled_after(x, scale, weights, scales):
    pairs = zip(weights, scales, strict=True)
    return [product(x, w) * (scale * s) for w, s in pairs]


def calls(function, projections, **options):
    def array(*shape, dtype=jnp.float8_e4m3fn):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    scale = array(dtype=jnp.bfloat16)
    weights, scales = [array(1024, 1024)] * projections, [scale] * projections
    lowered = jax.jit(function).lower(array(1024, 1024), scale, weights, scales)
    text = lowered.compile(compiler_options=options).as_text()
    found = re.findall(r'custom_call_target="([^"]*matmul[^"]*)"', text)
    print(function.__name__, projections, options, found)
    return found


same = calls(scaled_before, 1) == [IN_FP8]
same &= calls(scaled_before, 2) == [IN_BFLOAT16]
same &= calls(scaled_before, 3) == [IN_BFLOAT16]
unmerged = calls(scaled_before, 3, xla_gpu_dot_merger_threshold_mb=0)
same &= unmerged == [IN_FP8] * 3
same &= set(calls(scaled_after, 3)) == {IN_FP8}
sys.exit(None if same else "changed")
EOF

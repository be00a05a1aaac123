# SPDX-License-Identifier: Apache-2.0
"""Compiles a config's train step for H200s that are not there, and says what it takes.

    python scripts/compile_step.py --config configs/llama_8b.py --gpus 8 \\
        [--config.kernels.attention=xla] [--json]

Bytes of one device, arrays that a step communicates, calls of kernels in its text,
where those of a loop's body count once, and the bill of what devices send each other.
Needs no GPU but what `make .venv/cuda` installs.
"""

import collections
import json
import re
import sys
import time
from typing import Any

from absl import flags as absl_flags

import sharding
from jaxllm import flags
from jaxllm.config import Config
from jaxllm.inspect.collectives import bill, read_collectives
from jaxllm.plan.cost import choices
from jaxllm.step import compile_step, prepare
from pallas_kernels import offline

# Ours say their name in the path of scopes, the others in the target of the call.
CALL = r'custom_call_target="(mosaic_gpu\w*|__cudnn\$\w+)".*?op_name="([^"]*)"'


def cost(config: Config, num_gpus: int) -> dict[str, Any]:
    """Returns bytes of a device, counts of collectives and kernel calls, the bill."""
    devices = offline.described_devices(num_gpus)
    mesh = sharding.make_mesh(config.mesh.sizes, devices)
    setup = prepare(config, mesh)
    chosen = choices(setup)
    began_at_s = time.perf_counter()
    step = compile_step(setup)
    compile_s = time.perf_counter() - began_at_s
    memory, text = step.memory_analysis(), step.as_text()
    assert memory is not None and text is not None
    # Arrays: one instruction may move several, and often if it is in a loop.
    moved = collections.Counter()
    collectives = read_collectives(text, mesh)
    for collective in collectives:
        moved[collective.kind] += len(collective.arrays) * (collective.count or 1)
    return {
        "choices": chosen.splitlines(),
        "compile_s": round(compile_s, 1),
        "arguments_bytes": memory.argument_size_in_bytes,
        "outputs_bytes": memory.output_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": dict(moved),
        "kernels": kernel_calls(text),
        "bill": bill(collectives),
    }


def kernel_calls(text: str) -> dict[str, int]:
    """Returns how often a compiled program's text calls each kernel."""
    return dict(
        collections.Counter(
            path.split("/")[-2] if target.startswith("mosaic") else target
            for target, path in re.findall(CALL, text)
        )
    )


def main(argv: list[str]) -> int:
    values, config = absl_flags.FLAGS, flags.config_from_flags()
    if not values.child:
        ended = offline.run_python([__file__, *sys.argv[1:], "--child"])
        print(ended.stdout, end="")
        print(ended.stderr[-4000:] if ended.returncode else "", file=sys.stderr, end="")
        return ended.returncode
    facts = cost(config, values.gpus)
    if values.json:
        print(json.dumps(facts))
        return 0
    for name, value in facts.items():
        if name.endswith("_bytes"):
            value = f"{value / 2**30:.3f} GiB"
        elif name == "bill":
            value = f"\n{value}"
        print(f"{name:<16} {value}")
    return 0


if __name__ == "__main__":
    flags.define_config_flags()
    absl_flags.DEFINE_integer("gpus", 8, "H200s to compile for, eight to a host")
    absl_flags.DEFINE_bool("json", False, "print a JSON object")
    absl_flags.DEFINE_bool("child", False, "for itself: the process that compiles")
    flags.run(main)

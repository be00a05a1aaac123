# SPDX-License-Identifier: Apache-2.0
"""Measures host memory and time of a model's way in and out, beside safetensors'.

    python scripts/measure_import.py --gigabytes 4 [--rounds 3] [--folder /scratch]

Makes a bfloat16 llama in shards of about 1 GB, in a temporary folder, and runs each of
these in a process of its own: safetensors' reading of all tensors (as they are, and as
float32, which is what a load gives), `hf.load` onto one CPU device, sharded over 8
simulated ones and over two processes (the one that maps more is shown), and the
commands `import` and `export`. The exported files must be the
imported bytes.

Memory is the largest RssAnon of /proc, polled each 5 ms, less that of the same process
on a model of a few kB: pages of a mapped file, which the kernel takes back when it
needs them, are beside it under "mapped". Parameters on a CPU device are float32 in that
memory, so they are taken off: what remains is counted in largest tensors of the files.
"""

import argparse
import concurrent.futures
import filecmp
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHARD_BYTES = 10**9
POLL_S = 0.005
# Widths of Llama 3.2 3B: the tied embedding is the largest tensor.
WIDE = {
    "vocab_size": 128_256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
}
NARROW = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
HOLD_HALF = ("safetensors", "load, 1 of 2 processes")
ROOT = Path(__file__).parents[1]
# Each prints the seconds of the work alone, without imports.
READ = """
from safetensors import safe_open
began_s = time.perf_counter()
found = []
for path in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    with safe_open(path, framework="numpy") as file:
        found += [CAST(file.get_tensor(name)) for name in file.keys()]
print(time.perf_counter() - began_s)
"""
LOAD = """
import os
import jax
import sharding
from pathlib import Path
from jaxllm.hf.folder import Folder, check
from jaxllm.hf.loading import load, read_params
if "OF_TWO" in os.environ:
    address, index = os.environ["OF_TWO"].split()
    jax.distributed.initialize(address, 2, int(index))
jax.devices()
began_s = time.perf_counter()
if len(jax.devices()) == 1:
    params = load(Path(sys.argv[1]))[1]
else:
    sizes = {2: {"tensor": 2}, 8: {"fsdp": 2, "tensor": 4}}
    mesh = sharding.make_mesh(sizes[len(jax.devices())])
    with Folder(Path(sys.argv[1])) as folder:
        model = check(folder)[0]
        plan = sharding.plan(model.abstract, model.letters, mesh)
        target = jax.tree.map(
            lambda leaf, place: leaf.update(sharding=place),
            model.abstract,
            plan.shardings(model.abstract),
        )
        params = read_params(folder, target)
jax.block_until_ready(params)
print(time.perf_counter() - began_s)
"""
PREAMBLE = "import glob, sys, time\nimport ml_dtypes, numpy\n"
PROGRAMS = {
    "safetensors": PREAMBLE + READ.replace("CAST", ""),
    "safetensors, float32": PREAMBLE
    + READ.replace(
        "CAST(file.get_tensor(name))", "file.get_tensor(name).astype(numpy.float32)"
    ),
    "load, 1 device": PREAMBLE + LOAD,
    "load, 8 devices": PREAMBLE + LOAD,
    "load, 1 of 2 processes": PREAMBLE + LOAD,
}


def write_model(folder: Path, sizes: dict[str, int], wanted_bytes: int) -> dict:
    """Writes a model of about so many bytes; returns what it is."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "torch_dtype": "bfloat16",
        **sizes,
    }
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes["vocab_size"], sizes["hidden_size"])
    }
    ends["model.norm.weight"] = (sizes["hidden_size"],)
    layer_bytes = sum(map(_bytes, layer_shapes(0, sizes).values()))
    left = wanted_bytes - sum(map(_bytes, ends.values()))
    config["num_hidden_layers"] = layers = max(2, round(left / layer_bytes))
    shapes = dict(ends)
    for number in range(layers):
        shapes |= layer_shapes(number, sizes)
    shards = list(_shards(shapes))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: draw(number, shapes[name]) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    total = sum(map(_bytes, shapes.values()))
    largest = max(map(_bytes, shapes.values()))
    return {"bytes": total, "largest": largest, "layers": layers, "files": len(shards)}


def layer_shapes(number: int, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of a layer."""
    prefix, width = f"model.layers.{number}.", sizes["hidden_size"]
    keys = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    inner = sizes["intermediate_size"]
    return {
        prefix + "self_attn.q_proj.weight": (width, width),
        prefix + "self_attn.k_proj.weight": (keys, width),
        prefix + "self_attn.v_proj.weight": (keys, width),
        prefix + "self_attn.o_proj.weight": (width, width),
        prefix + "mlp.gate_proj.weight": (inner, width),
        prefix + "mlp.up_proj.weight": (inner, width),
        prefix + "mlp.down_proj.weight": (width, inner),
        prefix + "input_layernorm.weight": (width,),
        prefix + "post_attention_layernorm.weight": (width,),
    }


def draw(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns finite bfloat16 numbers of both signs around one."""
    bits = np.random.default_rng(seed).integers(0, 2**16, shape, np.uint16)
    return ((bits & 0x80FF) | 0x3F00).view(ml_dtypes.bfloat16)


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    for name, shape in shapes.items():
        if (
            names
            and sum(_bytes(shapes[n]) for n in names) + _bytes(shape) > SHARD_BYTES
        ):
            yield names
            names = []
        names.append(name)
    yield names


def watch(command: list[str], devices: int, **env: str) -> dict[str, float]:
    """Runs a command; returns its seconds, and the largest memory of each kind."""
    env = os.environ | env
    env |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
    }
    began_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True)
    peaks = {"RssAnon": 0, "RssFile": 0, "RssShmem": 0}
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
        time.sleep(POLL_S)
    assert process.stdout is not None
    said = process.stdout.read().split()
    if process.wait():
        raise SystemExit(f"{command} ended with {process.returncode}")
    seconds = time.perf_counter() - began_s
    if command[1] == "-c":
        seconds = float(said[-1])  # without the start of the program
    anonymous = peaks["RssAnon"] + peaks["RssShmem"]
    return {"s": seconds, "memory": anonymous, "mapped": peaks["RssFile"]}


def run(name: str, folder: Path, home: Path) -> dict[str, float]:
    """Runs one of the ways on a model's folder."""
    devices = 8 if "8" in name else 1
    if name in PROGRAMS:
        command = [sys.executable, "-c", PROGRAMS[name], str(folder)]
        if "of 2" not in name:
            return watch(command, devices)
        with socket.socket() as free, concurrent.futures.ThreadPoolExecutor() as both:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
            free.close()
            started = [
                both.submit(watch, command, 1, OF_TWO=f"{address} {index}")
                for index in range(2)
            ]
            return max((each.result() for each in started), key=lambda x: x["mapped"])
    command = [sys.executable, "-m", "jaxllm.hf"]
    if name == "import":
        command += ["import", str(folder), f"--workdir={home}/run"]
    else:
        command += ["export", f"--workdir={home}/run", f"--to={home}/out"]
    return watch(command, devices)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, required=True, help="of the files")
    parser.add_argument("--rounds", type=int, default=3, help="of reading and loading")
    parser.add_argument("--folder", default=None, help="where there is room, 5 times")
    values = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=values.folder) as home:
        measure(Path(home), int(values.gigabytes * 1e9), values.rounds)


def measure(home: Path, wanted_bytes: int, rounds: int) -> None:
    """Prints a row for each way."""
    facts = write_model(home / "model", WIDE, wanted_bytes)
    write_model(home / "tiny" / "model", NARROW, 0)
    largest = facts["largest"]
    print(
        f"{facts['bytes'] / 1e9:.2f} GB of bfloat16 in {facts['files']} files, "
        f"{facts['layers']} layers, largest tensor {largest / 1e9:.3f} GB; float32 "
        f"parameters are {facts['bytes'] * 2 / 1e9:.2f} GB"
    )
    names = [*PROGRAMS, "import", "export"]
    base = {name: run(name, home / "tiny" / "model", home / "tiny") for name in names}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in PROGRAMS:
            results[name].append(run(name, home / "model", home))
    for name in ("import", "export"):
        results[name].append(run(name, home / "model", home))
    print(f"{'':<22} {'seconds, each':<20}  memory   mapped  beyond what it holds")
    for name, found in results.items():
        held = facts["bytes"] * (1 if name in HOLD_HALF else 2)
        memory = max(each["memory"] for each in found) - base[name]["memory"]
        mapped = max(each["mapped"] for each in found) - base[name]["mapped"]
        beyond = memory - held
        seconds = " ".join(f"{each['s']:.2f}" for each in found)
        print(
            f"{name:<22} {seconds:<20} {memory / 1e9:>5.2f} GB {mapped / 1e9:>5.2f} GB "
            f"{beyond / 1e9:>6.2f} GB = {beyond / largest:.2f} of the largest"
        )
    for path in sorted((home / "model").glob("*.safetensors")):
        same = filecmp.cmp(path, home / "out" / path.name, shallow=False)
        print(f"{path.name}: {'the same bytes' if same else 'DIFFERS'} after export")


if __name__ == "__main__":
    main()

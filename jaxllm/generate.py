# SPDX-License-Identifier: Apache-2.0
"""Generates text with a run's model.

python -m jaxllm.generate --workdir runs/x --prompt "def add(a, b):" [--prompt ...]
"""

import sys
from collections.abc import Iterator, Sequence

import jax
from absl import flags as absl_flags

from jaxllm import flags
from jaxllm.cluster.devices import find_devices
from jaxllm.inference import Sampling, generate, load_for_generation, read_request
from jaxllm.inference.request import USUAL_TOKENS
from jaxllm.run.compilation_cache import use_compilation_cache
from jaxllm.run.saved_model import load_run_tokenizer, read_step


def main(argv: list[str]):
    del argv
    values = absl_flags.FLAGS
    config, workdir = flags.config_from_flags(), flags.workdir_from_flags()
    use_compilation_cache()
    sampling = Sampling(
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        seed=values.seed,
    )
    which = read_step(values.step)
    find_devices(jax.config.jax_platforms)
    prompts = values.prompt or [""]
    request = read_request(
        workdir,
        config,
        which,
        load_run_tokenizer(workdir, values.tokenizer),
        prompts,
        max_tokens=values.max_tokens,
        sampling=sampling,
    )
    model, params, mesh = load_for_generation(workdir, config, which, values.devices)
    with jax.set_mesh(mesh):
        _print_streams(prompts, generate(model, params, request))


def _print_streams(prompts: Sequence[str], pieces: Iterator[tuple[int, str]]):
    """Prints the first prompt's text as it is generated, then the others in order."""
    held = [""] * len(prompts)
    sys.stdout.write(prompts[0])
    for number, piece in pieces:
        if number:
            held[number] += piece
        else:
            sys.stdout.write(piece)
            sys.stdout.flush()
    print()
    for number, prompt in enumerate(prompts[1:], 1):
        print(f"\n--- {number + 1} ---\n{prompt}{held[number]}")


if __name__ == "__main__":
    flags.define_config_flags()
    absl_flags.DEFINE_multi_string(
        "prompt", [], "text to continue; repeat the flag for a batch"
    )
    absl_flags.DEFINE_integer(
        "max_tokens",
        None,
        "largest number of new tokens per prompt; by default "
        f"{USUAL_TOKENS}, or fewer where a trained row ends",
    )
    absl_flags.DEFINE_float(
        "temperature", 0.8, "sampling temperature; 0: greedy decoding"
    )
    absl_flags.DEFINE_integer(
        "top_k", 0, "sample from the k likeliest tokens; 0: from all"
    )
    absl_flags.DEFINE_float(
        "top_p",
        0.95,
        "nucleus sampling: total probability of the tokens to sample from",
    )
    absl_flags.DEFINE_integer("seed", 0, "random seed of the sampling")
    absl_flags.DEFINE_string(
        "step", "latest", "checkpoint to load: a step, latest or best"
    )
    absl_flags.DEFINE_string(
        "tokenizer",
        None,
        "tokenizer.json or bytes, instead of the tokenizer of the run",
    )
    absl_flags.DEFINE_integer("devices", 1, "number of devices to shard the model over")
    flags.run(main, sections=("kernels",))

# SPDX-License-Identifier: Apache-2.0
"""Writes text with a run's model.

python -m jaxllm.generate --workdir runs/x --prompt "def add(a, b):" [--prompt ...]
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags as absl_flags

import sharding
from jaxllm import flags
from jaxllm.config import Config
from jaxllm.errors import InputError
from jaxllm.models import Model
from jaxllm.plan.kernels import choose_kernels
from jaxllm.run.saved_model import Which, load_params, load_run_tokenizer, read_step
from jaxllm.sampling import Sampling, sample_tokens
from jaxllm.text.tokenizers import Tokenizer


def generate(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling,
) -> Iterator[tuple[int, str]]:
    """Yields (number of the prompt, next piece of its text) as they are made.

    A prompt ends at the end of a document, or after max_tokens. An empty prompt begins
    a new document.
    """
    start = tokenizer.end_of_document
    ids = [
        tokenizer.encode(prompt) or ([] if start is None else [start])
        for prompt in prompts
    ]
    made: list[list[int]] = [[] for _ in prompts]
    tokens = sample_tokens(
        model,
        params,
        ids,
        max_tokens=max_tokens,
        sampling=sampling,
        end_of_document=tokenizer.end_of_document,
    )
    for column in tokens:
        for number, token in enumerate(column):
            if token is None:
                continue
            piece = tokenizer.decode_stream(ids[number] + made[number], token)
            made[number].append(token)
            if piece:
                yield number, piece


def load_for_generation(
    workdir: Path, config: Config, which: Which, num_devices: int = 1
) -> tuple[Model, Any, jax.sharding.Mesh]:
    """Returns a run's model, its saved parameters and the mesh they are on.

    Args:
      num_devices: devices over which heads, MLP and vocabulary are cut.
    """
    if not 1 <= num_devices <= len(jax.devices()):
        raise InputError(
            f"--devices={num_devices} must be from 1 to the {len(jax.devices())} that "
            "this machine has."
        )
    mesh = sharding.make_mesh({"tensor": num_devices}, jax.devices()[:num_devices])
    choose_kernels(config, mesh)  # refuses what these devices cannot do
    model = Model(config.model, config.kernels)
    plan = sharding.plan(model.abstract, model.letters, mesh)
    target = jax.tree.map(
        lambda leaf, place: leaf.update(sharding=place),
        model.abstract,
        plan.shardings(model.abstract),
    )
    _, params = load_params(workdir, config, which, target)
    return model, params, mesh


def main(argv: list[str]):
    del argv
    values = absl_flags.FLAGS
    config, workdir = flags.config_from_flags(), flags.workdir_from_flags()
    sampling = Sampling(
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        seed=values.seed,
    )
    tokenizer = load_run_tokenizer(workdir, values.tokenizer)
    which = read_step(values.step)
    model, params, mesh = load_for_generation(workdir, config, which, values.devices)
    prompts = values.prompt or [""]
    with jax.set_mesh(mesh):
        pieces = generate(
            model,
            params,
            tokenizer,
            prompts,
            max_tokens=values.max_tokens,
            sampling=sampling,
        )
        _print_streams(prompts, pieces)


def _print_streams(prompts: Sequence[str], pieces: Iterator[tuple[int, str]]):
    """Prints the first prompt's text as it is made, then the others' in their order."""
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
    absl_flags.DEFINE_multi_string("prompt", [], "text to go on from; may be repeated")
    absl_flags.DEFINE_integer("max_tokens", 256, "tokens to write at most, per prompt")
    absl_flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token")
    absl_flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0 is all")
    absl_flags.DEFINE_float("top_p", 0.95, "draw from the likeliest tokens of this sum")
    absl_flags.DEFINE_integer("seed", 0, "of the draws")
    absl_flags.DEFINE_string("step", "latest", "save to load: N, latest or best")
    absl_flags.DEFINE_string("tokenizer", None, "instead of the one of the run's data")
    absl_flags.DEFINE_integer("devices", 1, "devices to cut the model over")
    flags.run(main)

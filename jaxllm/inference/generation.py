# SPDX-License-Identifier: Apache-2.0
"""Text from a run's model, streamed as it is generated."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

import sharding
from jaxllm.config import Config
from jaxllm.errors import InputError
from jaxllm.inference.sampling import Sampling, sample_tokens
from jaxllm.models import Model
from jaxllm.plan.kernels import choose_kernels
from jaxllm.run.saved_model import Which, load_params
from jaxllm.text.decoding import TextStream
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
    """Yields (number of the prompt, next piece of its text) as they are generated.

    The text of a prompt ends with its document, or after max_tokens. An empty prompt
    begins a new document.
    """
    start = tokenizer.end_of_document
    ids = [
        tokenizer.encode(prompt) or ([] if start is None else [start])
        for prompt in prompts
    ]
    streams = [TextStream(tokenizer, each) for each in ids]
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
            if token is not None and (piece := streams[number].add(token)):
                yield number, piece
    for number, stream in enumerate(streams):
        if piece := stream.flush():
            yield number, piece


def load_for_generation(
    workdir: Path, config: Config, which: Which, num_devices: int = 1
) -> tuple[Model, Any, jax.sharding.Mesh]:
    """Returns a run's model, its saved parameters and the mesh they are on.

    Args:
      workdir: of the run.
      config: of the run.
      which: the checkpoint to load.
      num_devices: devices over which heads, MLP and vocabulary are sharded.
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

# SPDX-License-Identifier: Apache-2.0
"""Text from a run's model, streamed as it is generated."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sharding
from jaxllm.config import Config
from jaxllm.errors import InputError
from jaxllm.inference.request import Request
from jaxllm.inference.sampling import sample_tokens
from jaxllm.models import Model
from jaxllm.plan.kernels import choose_kernels
from jaxllm.run.saved_model import Which, load_params
from jaxllm.text.decoding import TextStream


def generate(model: Model, params: Any, request: Request) -> Iterator[tuple[int, str]]:
    """Yields (number of the prompt, next piece of its text) as they are generated.

    The text of a prompt ends with its document, or after `request.max_tokens`.

    Args:
      model: without parameters.
      params: placed on the mesh of `jax.set_mesh`.
      request: from `read_request`.
    """
    tokenizer = request.tokenizer
    # The model's vocabulary may have more ids than the tokenizer has tokens.
    known_V = np.zeros(model.config.vocab_size, bool)
    known_V[[i for i in tokenizer.ids if i < len(known_V)]] = True
    streams = [TextStream(tokenizer, prompt) for prompt in request.prompts]
    tokens = sample_tokens(
        model,
        params,
        request.prompts,
        max_tokens=request.max_tokens,
        sampling=request.sampling,
        known_V=known_V,
        ends=request.ends,
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

# SPDX-License-Identifier: Apache-2.0
"""What a model is asked to write: prompts as tokens, and how many may follow."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxllm.cluster.memory import check_room, device_bytes, host_bytes
from jaxllm.config import Config
from jaxllm.errors import InputError
from jaxllm.hf.carried import read_carried
from jaxllm.inference.sampling import Sampling, cache_length
from jaxllm.run.saved_model import Which, document_starts
from jaxllm.text.lost_characters import encode_and_count
from jaxllm.text.tokenizers import BytesTokenizer, Tokenizer

USUAL_TOKENS = 256  # that follow a prompt, where the caller does not say
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts, checked against the run that is to continue them.

    Attributes:
      tokenizer: of the run's data.
      prompts: token ids, at least one each.
      max_tokens: largest number of new tokens, per prompt.
      sampling: how each is sampled.
      ends: tokens that end a document.
    """

    tokenizer: Tokenizer
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    sampling: Sampling
    ends: frozenset[int]


def read_request(
    workdir: Path,
    config: Config,
    which: Which,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_tokens: int | None = None,
    sampling: Sampling,
) -> Request:
    """Returns the tokens of prompts, each begun as the run saw its documents begin.

    Args:
      workdir: of the run.
      config: of the run.
      which: the checkpoint that will continue them.
      tokenizer: of the run's data.
      texts: prompts; an empty one begins a document.
      max_tokens: largest number of new tokens, per prompt; None is the usual number, or
        fewer where the length of a trained row ends.
      sampling: how each is sampled.

    Raises:
      InputError: the run cannot continue one of them.
    """
    starts = document_starts(workdir, config, which)
    end = tokenizer.end_of_document
    start = end if end in starts else min(starts, default=None)
    begin = () if start is None else (start,)
    prompts = tuple((*begin, *ids) for ids in _encode(tokenizer, texts))
    _check_prompts(config, prompts)
    if sampling.top_k > config.model.vocab_size:
        raise InputError(
            f"--top_k={sampling.top_k} must be at most "
            f"config.model.vocab_size={config.model.vocab_size}; 0 is all tokens."
        )
    max_tokens = _choose_length(config, prompts, max_tokens)
    _check_memory(config, prompts, max_tokens)
    _warn_of_length(config, prompts, max_tokens)
    return Request(
        tokenizer=tokenizer,
        prompts=prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        ends=starts
        | frozenset(() if end is None else (end,))
        | frozenset(read_carried(workdir).end_tokens),
    )


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    if isinstance(tokenizer, BytesTokenizer):
        return tokenizer.encode_batch(texts)
    batch, lost = encode_and_count(tokenizer, texts)
    if lost.vanished:
        raise InputError(
            f"the tokenizer of this run has no token for {lost.name_vanished()}, nor "
            "an unknown token: a prompt would lose it. Write --prompt without it."
        )
    if lost.unknown:
        _log.warning(
            "%d of %d characters of the prompts are unknown to the tokenizer of this "
            "run, and look the same to its model.",
            lost.unknown,
            lost.total,
        )
    return batch


def _check_prompts(config: Config, prompts: Sequence[Sequence[int]]):
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(
                f"prompt {number} is empty, and this run has not learned how documents "
                "begin: its data has no token that ends them all, or an earlier "
                "version of jaxllm trained it. Give --prompt at least one character."
            )
        unknown = [t for t in prompt if not 0 <= t < config.model.vocab_size]
        if unknown:
            raise InputError(
                f"prompt {number} has token {unknown[0]}, but the model's "
                f"vocab_size={config.model.vocab_size}; use the tokenizer of its data."
            )


def _choose_length(
    config: Config, prompts: Sequence[Sequence[int]], max_tokens: int | None
) -> int:
    known = _num_known(config, prompts)
    if max_tokens is None and known < 1:
        lengths = [len(prompt) for prompt in prompts]
        raise InputError(
            f"prompt {lengths.index(max(lengths))} has {max(lengths)} tokens, and the "
            f"run was trained on {_describe_rows(config)}: shorten it, or give "
            "--max_tokens to go beyond them."
        )
    if max_tokens is None:
        return min(USUAL_TOKENS, known)
    if not 1 <= max_tokens < 2**31:
        raise InputError(f"--max_tokens={max_tokens} must be from 1 to 2**31 - 1.")
    return max_tokens


def _warn_of_length(config: Config, prompts: Sequence[Sequence[int]], max_tokens: int):
    if max_tokens > (known := _num_known(config, prompts)):
        _log.warning(
            "The run was trained on %s, and a prompt of %d with --max_tokens=%d goes "
            "beyond them: what it writes there may make no sense%s.",
            _describe_rows(config),
            max(map(len, prompts)),
            max_tokens,
            f"; --max_tokens={known} ends there" if known > 0 else "",
        )


def _num_known(config: Config, prompts: Sequence[Sequence[int]]) -> int:
    """Returns how many new tokens a trained row has room for behind every prompt."""
    # The last token that is written is never read: it may be the target of a full row.
    return config.data.sequence_length + 1 - max(map(len, prompts))


def _describe_rows(config: Config) -> str:
    return f"rows of config.data.sequence_length={config.data.sequence_length} tokens"


def _check_memory(config: Config, prompts: Sequence[Sequence[int]], max_tokens: int):
    model, devices = config.model, jax.local_devices()
    length = cache_length(max(map(len, prompts)) + max_tokens)
    heads = 2 * model.num_layers * model.num_kv_heads  # of keys and of values
    size = heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    of_device = device_bytes(devices[0])
    check_room(
        f"--max_tokens={max_tokens}, with a cache of {length} positions for each of "
        f"{len(prompts)} prompts,",
        len(prompts) * length * size,
        host_bytes() if of_device is None else of_device * len(devices),
        "lower --max_tokens, or give fewer prompts",
    )

# SPDX-License-Identifier: Apache-2.0
"""The token splits of a run: opened, checked against each other, and remembered."""

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jaxllm.config import DataConfig
from jaxllm.data.formats import TokenSplit, open_tokens
from jaxllm.errors import InputError

ORDER_VERSION = 1  # raise it when the same settings begin to give other batches


def open_splits(
    config: DataConfig, split: Literal["train", "eval"]
) -> tuple[TokenSplit, ...]:
    """Opens what a run trains on or is evaluated on; all that is wrong is one error.

    The eval tokens are those of `config.data.eval_paths`: the held-out part of a token
    folder that has one, else all of it. Without `eval_paths` they are the held-out
    parts that the folders of `config.data.paths` have.
    """
    problems: list[str] = []
    train = _open_all(config.paths, _open_train, problems)
    if split == "train":
        problems += _misfits(config, train) + _tokenizer_problems(train)
        return _checked(train, problems)

    held_out = (
        _open_all(config.eval_paths, _open_held_out, problems)
        if config.eval_paths
        else _open_all(config.paths, lambda path: open_tokens(path, "eval"), problems)
    )
    if not held_out and not problems:
        problems.append(
            f"config.data.eval_paths=() and none of config.data.paths={config.paths} "
            "has a held-out part; give config.data.eval_paths, or make a held-out part "
            "with `python -m jaxllm.tokenize --holdout`, or set config.eval.every=0."
        )
    problems += _tokenizer_problems(train + held_out) + _leaks(train, held_out)
    problems += [
        f"The held-out part of {one.path} has {one.num_tokens} tokens, and nothing to "
        "predict; hold more out, or give config.data.eval_paths."
        for one in held_out
        if _longest_document(one, config) < 2
    ]
    return _checked(held_out, problems)


def check_vocab(splits: Sequence[TokenSplit], vocab_size: int):
    """Refuses tokens that the model has no embedding for.

    A file that does not say how many tokens its vocabulary has passes; its batches are
    looked at as they are made.
    """
    problems = [
        f"config.model.vocab_size={vocab_size} must be at least the {split.vocab_size} "
        f"tokens in the vocabulary of {split.path}; use {split.vocab_size} or, for "
        f"speed, {-(-split.vocab_size // 128) * 128}."
        for split in splits
        if split.vocab_known and split.vocab_size > vocab_size
    ]
    _checked(splits, problems)


def data_fingerprint(
    config: DataConfig, splits: Sequence[TokenSplit]
) -> dict[str, Any]:
    """Returns what, with the seed, decides every batch; it can be written as JSON.

    Tokens are known by their content: a file may be moved without being another.
    """
    tokenizers = sorted({split.tokenizer for split in splits if split.tokenizer})
    return {
        "order_version": ORDER_VERSION,
        "config.data.paths": [split.fingerprint for split in splits],
        "config.data.weights": list(config.weights),
        "config.data.sequence_length": config.sequence_length,
        "config.data.batch_size": config.batch_size,
        "config.data.packing": config.packing,
        "config.data.shuffle": config.shuffle,
        "tokenizer": tokenizers,
    }


def describe_change(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Returns why two fingerprints give different batches; None if they do not."""
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    if not changed:
        return None
    changes = []
    for name in changed:
        was, now = old.get(name), new.get(name)
        if name == "config.data.paths":
            changes.append(_describe_paths(was or [], now or []))
        else:
            changes.append(f"{name} was {_show(was)} and is now {_show(now)}")
    return (
        f"{'; '.join(changes)}: the batches would not be those of the run so far. "
        "Give it back its old value, or start in another --workdir."
    )


def _open_all(
    paths: Sequence[str],
    open_one: Callable[[str], TokenSplit | None],
    problems: list[str],
) -> tuple[TokenSplit, ...]:
    opened = []
    for path in paths:
        try:
            opened.append(open_one(path))
        except InputError as error:
            problems.append(str(error))
    return tuple(split for split in opened if split is not None)


def _open_train(path: str) -> TokenSplit:
    split = open_tokens(path, "train")
    if split is None:
        raise InputError(
            f"{path} in config.data.paths has no training part, only a held-out one; "
            "make it with a smaller `--holdout`, or leave it out."
        )
    return split


def _open_held_out(path: str) -> TokenSplit | None:
    held_out = open_tokens(path, "eval")
    return open_tokens(path, "train") if held_out is None else held_out


def _checked(splits: Sequence[TokenSplit], problems: list[str]):
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return tuple(splits)


def _misfits(config: DataConfig, splits: Sequence[TokenSplit]) -> list[str]:
    """Returns what keeps splits from being packed into rows for training."""
    problems = []
    length = config.sequence_length
    for split in splits:
        if config.packing == "best_fit":
            if split.document_ends is None:
                problems.append(
                    "config.data.packing=best_fit needs to know where documents end, "
                    f"and {split.path} does not say; use config.data.packing=concat."
                )
            elif _longest_document(split, config) < 2:
                problems.append(
                    f"{split.path} in config.data.paths has no document of 2 tokens or "
                    "more, and so nothing to predict; tokenize longer documents."
                )
        elif split.num_tokens <= length:
            problems.append(
                f"config.data.sequence_length={length} needs {length + 1} tokens for "
                f"one row (its inputs and the last target), and {split.path} has "
                f"{split.num_tokens}; use at most {split.num_tokens - 1}, or more text."
            )
    return problems


def _longest_document(split: TokenSplit, config: DataConfig) -> int:
    if config.packing == "concat" or split.document_ends is None:
        return split.num_tokens
    return int(np.diff(split.document_ends, prepend=0).max(initial=0))


def _tokenizer_problems(splits: Sequence[TokenSplit]) -> list[str]:
    paths_of: dict[str, list[str]] = {}
    for split in splits:
        if split.tokenizer:
            paths_of.setdefault(split.tokenizer, []).append(split.path)
    if len(paths_of) < 2:
        return []
    used = "; ".join(
        f"{', '.join(dict.fromkeys(paths))} by {tokenizer[:12]}"
        for tokenizer, paths in paths_of.items()
    )
    return [
        "config.data.paths and config.data.eval_paths must come from one tokenizer, "
        f"and were made by {len(paths_of)} ({used}); tokenize all of them with one."
    ]


def _leaks(train: Sequence[TokenSplit], held_out: Sequence[TokenSplit]) -> list[str]:
    return [
        f"The held-out tokens of {eval_split.path} are tokens of {split.path} in "
        "config.data.paths, which the model learns: the eval loss would measure "
        "memory; give other config.data.eval_paths, or make a held-out part with "
        "`python -m jaxllm.tokenize --holdout`."
        for eval_split, split in itertools.product(held_out, train)
        if eval_split.fingerprint == split.fingerprint
        or _files(eval_split) & _files(split)
    ]


def _files(split: TokenSplit) -> set[str]:
    arrays = [array for shard in split.shards for array in (shard, shard.base)]
    maps = [array for array in arrays if isinstance(array, np.memmap)]
    return {os.path.realpath(array.filename) for array in maps if array.filename}


def _describe_paths(old: list[str], new: list[str]) -> str:
    if len(old) != len(new):
        return f"config.data.paths was {len(old)} paths and is now {len(new)}"
    numbers = [str(i) for i in range(len(old)) if old[i] != new[i]]
    if sorted(old) == sorted(new):
        return f"config.data.paths has another order, at {', '.join(numbers)}"
    return f"the tokens of config.data.paths changed, at {', '.join(numbers)}"


def _show(value: Any) -> str:
    return "none" if value is None or value == [] else str(value)

# SPDX-License-Identifier: Apache-2.0
"""The token splits of a run: opened, and checked against each other."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.config import DataConfig
from jaxllm.data.formats import TokenSplit, open_tokens
from jaxllm.data.packing import row_without_targets
from jaxllm.data.sample import occurrences
from jaxllm.data.token_file import TokenFile
from jaxllm.errors import InputError

_Part = Callable[..., TokenSplit | None]


def open_train(config: DataConfig) -> tuple[TokenSplit, ...]:
    """Opens what a run trains on; all that is wrong is one error."""
    problems: list[str] = []
    train = _open_all(config.paths, _opener(config, _train_part), problems)
    problems += _repeated("paths", train) + _tokenizer_problems(train)
    for split in train:
        problems += _misfits(config, split, "paths") + _row_problems(config, split)
    if not problems:
        problems += _unused(config, train)
    return _checked(train, problems)


def open_held_out(
    config: DataConfig, train: Sequence[TokenSplit]
) -> tuple[TokenSplit, ...]:
    """Opens what a run is evaluated on; all that is wrong is one error.

    The tokens are those of `config.data.eval_paths`: the held-out part of a token
    folder that has one, else all of it. Without `eval_paths` they are the held-out
    parts that the folders of `config.data.paths` have.

    Args:
      config: of the data.
      train: from `open_train`. A short file says what is between its documents where
        they all say it.
    """
    problems: list[str] = []
    known = {split.end_of_document for split in train}
    usual = known.pop() if len(known) == 1 else None
    part = _held_out_or_all if config.eval_paths else _held_out_part
    held_out = _open_all(
        config.eval_paths or config.paths, _opener(config, part, usual), problems
    )
    if not held_out and not problems:
        problems.append(
            f"config.data.eval_paths=() and none of config.data.paths={config.paths} "
            "has a held-out part; give config.data.eval_paths, or make one with "
            "`--holdout 0.05` of `python -m jaxllm.tokenize`, or set "
            "config.eval.every=0."
        )
    problems += _tokenizer_problems([*train, *held_out]) + _leaks(train, held_out)
    problems += _repeated("eval_paths", held_out)
    for one in held_out:
        problems += _misfits(
            config, one, "eval_paths" if config.eval_paths else "paths"
        )
        if not one.num_targets:
            problems.append(
                f"The held-out part of {one.path} has {one.num_tokens} tokens, and "
                "nothing to predict; hold more out, or give config.data.eval_paths."
            )
    return _checked(held_out, problems)


def check_batch(config: DataConfig, num_rows: int):
    """Refuses batches of more rows than there are: they would have some twice."""
    if config.batch_size > num_rows:
        raise InputError(
            f"config.data.batch_size={config.batch_size} is more than the {num_rows} "
            f"rows of {config.sequence_length} tokens that config.data.paths have: a "
            f"batch would have some of them twice; use at most {num_rows}, or more "
            "text."
        )


def describe_documents(split: TokenSplit) -> str | None:
    """Returns what a user should know of how documents are found, if anything."""
    last = split.end_of_document
    if last is None:
        return (
            f"{split.path}: its documents do not end in one token, so the first token "
            "of each is never a target, and the model cannot begin a document."
        )
    if split.document_ends is None:
        return (
            f"{split.path}: token {last} is taken for what is between documents; "
            "another one can be named with config.data.end_of_document."
        )
    return None


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


def _opener(
    config: DataConfig, part: _Part, usual: int | None = None
) -> Callable[[str], TokenSplit | None]:
    """Returns what opens a part of a path, as the config says to read it."""
    named = config.end_of_document
    return functools.partial(
        part,
        raw_dtype=config.raw_dtype,
        end_of_document=usual if named is None else named,
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


def _train_part(path: str, **reading: Any) -> TokenSplit:
    split = open_tokens(path, "train", **reading)
    if split is None:
        raise InputError(
            f"{path} in config.data.paths has no training part, only a held-out one; "
            "make it with a smaller `--holdout`, or leave it out."
        )
    return split


def _held_out_part(path: str, **reading: Any) -> TokenSplit | None:
    return open_tokens(path, "eval", **reading)


def _held_out_or_all(path: str, **reading: Any) -> TokenSplit | None:
    held_out = open_tokens(path, "eval", **reading)
    return open_tokens(path, "train", **reading) if held_out is None else held_out


def _checked(splits: Sequence[TokenSplit], problems: list[str]):
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return tuple(splits)


def _misfits(config: DataConfig, split: TokenSplit, setting: str) -> list[str]:
    """Returns why the documents of a split are not found as the config needs them."""
    if split.document_ends is not None:
        return []
    if config.packing == "best_fit":
        return [
            "config.data.packing=best_fit needs to know where documents end, and "
            f"{split.path} does not list that; use config.data.packing=concat."
        ]
    if split.end_of_document is None and not config.cross_document_attention:
        return [
            f"{split.path} in config.data.{setting} does not say where documents end: "
            "name the token between them with config.data.end_of_document, or, for one "
            "document or attention over all of them, set "
            "config.data.cross_document_attention=true."
        ]
    named = config.end_of_document
    if named is not None and setting == "paths":
        if not occurrences(split.num_tokens, split.slice, named)[0]:
            return [
                f"config.data.end_of_document={named} is not among the tokens of "
                f"{split.path} that were looked at (256 blocks of 4096); name the one "
                "that is between its documents."
            ]
    return []


def _row_problems(config: DataConfig, split: TokenSplit) -> list[str]:
    """Returns what keeps a split from being packed into rows that teach something."""
    if not split.num_targets:
        return [
            f"{split.path} in config.data.paths has no document of 2 tokens or more, "
            "and so nothing to predict; tokenize longer documents."
        ]
    if config.packing == "best_fit":
        return []
    length = config.sequence_length
    slots = split.num_tokens - (split.end_of_document is None)
    if slots < length:
        return [
            f"config.data.sequence_length={length} needs "
            f"{length + split.num_tokens - slots} tokens for one row, and "
            f"{split.path} has {split.num_tokens}; use at most {slots}, or more text."
        ]
    row = row_without_targets(split, length)
    if row is None:
        return []
    return [
        f"{split.path} in config.data.paths has only documents of one token from token "
        f"{row * length} to {(row + 1) * length}, a row with nothing to predict; use "
        "config.data.packing=best_fit, which leaves them out."
    ]


def _unused(config: DataConfig, splits: Sequence[TokenSplit]) -> list[str]:
    """Returns that settings for raw files are given where none is read."""
    named = config.end_of_document
    if named is None or any(split.document_ends is None for split in splits):
        return []
    return [
        f"config.data.end_of_document={named} is for files that do not list their "
        "documents, and all of config.data.paths do; leave it out."
    ]


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
        "`--holdout 0.05` of `python -m jaxllm.tokenize`."
        for eval_split, split in itertools.product(held_out, train)
        if eval_split.fingerprint == split.fingerprint
        or _files(eval_split) & _files(split)
    ]


def _repeated(setting: str, splits: Sequence[TokenSplit]) -> list[str]:
    return [
        f"config.data.{setting} has the tokens of {one.path} twice, as {other.path} "
        "too; name them once: config.data.weights gives a path more weight in training."
        for one, other in itertools.combinations(splits, 2)
        if one.fingerprint == other.fingerprint or _files(one) & _files(other)
    ]


def _files(split: TokenSplit) -> set[tuple[int, int]]:
    return {shard.identity for shard in split.shards if isinstance(shard, TokenFile)}

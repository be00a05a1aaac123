# SPDX-License-Identifier: Apache-2.0
"""Turns text into a folder of tokens to train on.

    python -m jaxllm.tokenize --input TEXT [--input ...] --output DIR --tokenizer bytes

--input is a file, a folder (all its files), a glob, - for standard input, or
python:stdlib for the source of Python's own library. A .jsonl, .json or .parquet file
has one document a row; any other file is UTF-8 text and one document. Text and JSON may
be compressed (.gz, .bz2, .xz, .zst). --tokenizer is `bytes`, the path of a
tokenizer.json, or `bpe:4096` to train one on the input. The output is the same for any
number of workers, and appears whole or not at all: after an interruption the same
command starts again. The exit status is 0 when finished, 2 if the input is wrong, 75 if
interrupted, 1 for anything else.
"""

import contextlib
import dataclasses
import difflib
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from absl import flags

from jaxllm.cluster.preemption import hang_up
from jaxllm.errors import (
    FAILED,
    FINISHED,
    RESUMABLE,
    WRONG_INPUT,
    FullDiskError,
    InputError,
)
from jaxllm.files import local_path
from jaxllm.output import guarded as guarded_output
from jaxllm.text.token_folder import TokenSettings, make_token_folder

_FLAGS: tuple[tuple[Any, ...], ...] = (
    (
        *(flags.DEFINE_multi_string, "input", []),
        "text: file, folder, glob or -; may be repeated",
    ),
    (flags.DEFINE_string, "output", None, "token folder to write"),
    (
        *(flags.DEFINE_string, "tokenizer", "bytes"),
        "bytes, a tokenizer.json, or bpe:SIZE to train one",
    ),
    (
        *(flags.DEFINE_string, "text_field", "text"),
        "field of .jsonl and .json, or column of .parquet, to read",
    ),
    (
        *(flags.DEFINE_enum, "stdin_format", "text", ["text", "jsonl"]),
        "format of standard input, --input=-",
    ),
    (
        *(flags.DEFINE_bool, "skip_invalid_rows", False),
        "leave out and count rows without text: null, no such field, no JSON",
    ),
    (
        *(flags.DEFINE_float, "max_lost", 0.0),
        "largest share of characters that a tokenizer without unknown token may drop",
    ),
    (
        *(flags.DEFINE_bool, "append_end_of_document", True),
        "append an end-of-document token to each document",
    ),
    (
        *(flags.DEFINE_string, "end_of_document", None),
        "name of that token, if tokenizer.json has an unusual one",
    ),
    (
        *(flags.DEFINE_float, "holdout", 0.01),
        "fraction of the text held out for evaluation",
    ),
    (
        *(flags.DEFINE_enum, "holdout_by", "document", ["document", "tail"]),
        "documents by hash, or the tail",
    ),
    (
        *(flags.DEFINE_integer, "shard_tokens", 100_000_000),
        "number of tokens per shard file",
    ),
    (flags.DEFINE_integer, "workers", 0, "number of processes; 0: one per core"),
    (
        *(flags.DEFINE_bool, "overwrite", False),
        "replace a token folder made with other settings",
    ),
    (flags.DEFINE_bool, "help", False, "show this text"),
)


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    try:
        with _terminable():
            return _run(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except FullDiskError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(
            "\ninterrupted; nothing is left behind. The same command starts again.",
            file=sys.stderr,
        )
        return RESUMABLE
    except BrokenProcessPool:
        print(
            "error: a worker died, perhaps for lack of memory; try fewer --workers.",
            file=sys.stderr,
        )
        return FAILED


def _run(argv: Sequence[str]) -> int:
    start = time.monotonic()
    values = _parse(argv)
    if values["help"]:
        print(_help_text())
        return FINISHED
    output = values["output"]
    if not output:
        raise InputError("--output is missing; give a new folder for the tokens.")
    for flag in ("input", "output", "tokenizer"):
        given = values[flag]
        for path in given if isinstance(given, list) else [given]:
            local_path(f"--{flag}", path)
    fields = {field.name for field in dataclasses.fields(TokenSettings)}
    settings = TokenSettings(**{name: values[name] for name in fields & set(values)})
    others = {name: values[name] for name in ("workers", "overwrite", "max_lost")}
    manifest = make_token_folder(settings, output, **others)
    for name, split in manifest.splits.items():
        print(f"{name}: {split.num_tokens:,} tokens, {split.num_documents:,} documents")
    print(
        f"{output}: vocabulary of {manifest.tokenizer.vocab_size}, "
        f"{time.monotonic() - start:.1f} s"
    )
    return FINISHED


def _define_flags() -> flags.FlagValues:
    # Not the global flags: main() can be called again, and beside other programs.
    values = flags.FlagValues()
    for define, name, *arguments in _FLAGS:
        define(name, *arguments, flag_values=values)
    return values


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    values = _define_flags()
    try:
        rest = values(list(argv))
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, list(values), n=1)
        hint = f"did you mean --{close[0]}?" if close else "--help lists them all."
        raise InputError(f"--{error.flagname} is not a flag; {hint}") from error
    except flags.Error as error:
        raise InputError(str(error)) from error
    if rest[1:]:
        raise InputError(f"{rest[1]!r} is not a flag; give text as --input={rest[1]}.")
    return values.flag_values_dict()


def _help_text() -> str:
    lines = [__doc__ or "", "Flags:"]
    values = _define_flags()
    for name in values:
        text, default = values[name].help, values[name].default
        text = text.partition(";\n")[0]  # absl adds a line to some
        note = "" if default in (None, [], False) else f" ({default})"
        head = f"  --{name:<22} "
        lines.append(
            textwrap.fill(
                f"{text}{note}",
                88,
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP interruptions; nothing interrupts the clean-up."""

    def interrupt(number: int, frame: object):
        for each in kinds:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    kinds = (signal.SIGINT, signal.SIGTERM, *hang_up())
    old = {kind: signal.signal(kind, interrupt) for kind in kinds}
    try:
        yield
    except BrokenProcessPool:
        time.sleep(0.5)  # a signal for all processes may have reached the workers first
        raise
    finally:
        for kind, handler in old.items():
            signal.signal(kind, handler)


if __name__ == "__main__":
    with guarded_output(needed=False):
        sys.exit(main(sys.argv))

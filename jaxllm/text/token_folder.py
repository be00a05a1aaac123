# SPDX-License-Identifier: Apache-2.0
"""Makes a token folder from text; can train a tokenizer on it first."""

import collections
import contextlib
import dataclasses
import hashlib
import heapq
import os
import sys
from collections.abc import Iterator, Sequence

from jaxllm.data.manifest import TOKENIZER, Manifest, SplitEntry, token_dtype
from jaxllm.errors import InputError
from jaxllm.text.borders import cut_anywhere, make_cutter
from jaxllm.text.documents import Reading, read_pieces
from jaxllm.text.encoding import Encoded, encode_pieces
from jaxllm.text.lost_characters import Losses
from jaxllm.text.progress import Advance, show_progress
from jaxllm.text.shards import is_held_out, write_splits
from jaxllm.text.sources import STDIN, Source, find_sources, hash_sources
from jaxllm.text.staging import commit, complete_move, finished, staged
from jaxllm.text.tokenizers import (
    BytesTokenizer,
    HFTokenizer,
    Tokenizer,
    check_trained_end,
    describe_tokenizer,
    load_tokenizer,
    train_bpe,
    trained_vocab_size,
)

TRAINING_BYTES = 2**26  # most bytes of text that a BPE is trained on
_WORKERS_A_CORE = 8  # at most
_WORKER_BYTES = 2**22  # bytes of text that justify one more worker


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """The settings that determine the tokens; stored in the manifest."""

    input: list[str]
    tokenizer: str
    text_field: str
    stdin_format: str
    append_end_of_document: bool
    end_of_document: str | None
    holdout: float
    holdout_by: str
    shard_tokens: int
    skip_invalid_rows: bool = False
    input_sha256: str = ""  # of the names, sizes and times of all files
    tokenizer_sha256: str = ""  # of a tokenizer.json

    def __post_init__(self):
        if not 0 <= self.holdout < 1:
            raise InputError(
                f"--holdout={self.holdout} must be at least 0 and below 1; 0.01 holds "
                "out one in a hundred."
            )
        if self.shard_tokens < 1:
            raise InputError(
                f"--shard_tokens={self.shard_tokens} must be at least 1; 100000000 "
                "makes files of 200 MB."
            )
        check_trained_end(self.tokenizer, self.end_of_document)
        if trained_vocab_size(self.tokenizer) and STDIN in self.input:
            raise InputError(
                f"--tokenizer={self.tokenizer} reads its text twice, and --input=- "
                "can be read once; write the text to a file and give that."
            )


def make_token_folder(
    settings: TokenSettings,
    output: str,
    *,
    workers: int = 0,
    overwrite: bool = False,
    max_lost: float = 0.0,
) -> Manifest:
    """Makes a token folder, or returns the manifest of one made with equal settings.

    Args:
      workers: number of processes; 0 is one a core.
      overwrite: replace a folder made with other settings.
      max_lost: largest share of characters that the tokenizer may drop.

    Raises:
      InputError: if the text, a setting or the output is wrong.
    """
    _check_bounds(workers, max_lost)
    sources = find_sources(settings.input, stdin_format=settings.stdin_format)
    settings = dataclasses.replace(
        settings,
        input_sha256=hash_sources(sources),
        tokenizer_sha256=_hash_tokenizer(settings.tokenizer),
    )
    complete_move(output)
    done = finished(output)
    if done and not overwrite:
        _check_same(output, done, settings)
        print(f"{output} is already done.")
        return done
    with staged(output, replaces=done) as folder:
        tokenizer = _make_tokenizer(settings, sources)
        manifest = Manifest(
            dtype=token_dtype(tokenizer.vocab_size),
            tokenizer=describe_tokenizer(tokenizer),
            settings=dataclasses.asdict(settings),
            splits=_write(folder, settings, sources, tokenizer, workers, max_lost),
        )
        commit(output, manifest)
    return manifest


def _make_tokenizer(settings: TokenSettings, sources: Sequence[Source]) -> Tokenizer:
    name = settings.tokenizer
    size = trained_vocab_size(name)
    if size is None:
        tokenizer = load_tokenizer(name, end_of_document=settings.end_of_document)
        if settings.append_end_of_document and tokenizer.end_of_document is None:
            raise InputError(
                f"--tokenizer={name} has no token of a usual name to end a document; "
                "name one with --end_of_document, or give "
                "--append_end_of_document=false."
            )
        return tokenizer
    texts = _training_texts(settings, sources)
    return train_bpe((text.decode() for text in texts), size)


def _training_texts(settings: TokenSettings, sources: Sequence[Source]) -> list[bytes]:
    """Returns the text that is not held out or, if large, a sample chosen by hash."""
    total = sum(source.num_bytes for source in sources)
    by_document = settings.holdout if settings.holdout_by == "document" else 0.0
    pieces = read_pieces(
        sources, _reading(settings, collections.Counter(), cut_anywhere)
    )
    chosen, num_bytes = [], 0  # a heap, of the highest hash first
    # Read here, not by the trainer, whose threads would block Ctrl-C.
    with show_progress("training the tokenizer", total) as advance:
        for number, piece in enumerate(pieces):
            advance(piece.source_bytes)
            if is_held_out(piece.document_hash, by_document):
                continue
            order = hashlib.blake2b(piece.text, digest_size=8).digest()
            heapq.heappush(chosen, (-int.from_bytes(order), number, piece.text))
            num_bytes += len(piece.text)
            while num_bytes > TRAINING_BYTES and len(chosen) > 1:
                num_bytes -= len(heapq.heappop(chosen)[-1])
    return [text for _, _, text in sorted(chosen, key=lambda each: each[1])]


def _reading(settings: TokenSettings, skipped: collections.Counter, cut) -> Reading:
    return Reading(settings.text_field, settings.skip_invalid_rows, skipped, cut)


def _write(
    folder: str,
    settings: TokenSettings,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    workers: int,
    max_lost: float,
) -> dict[str, SplitEntry]:
    if isinstance(tokenizer, HFTokenizer):
        with open(os.path.join(folder, TOKENIZER), "wb") as file:
            file.write(tokenizer.json)
            os.fsync(file.fileno())
    total = sum(source.num_bytes for source in sources)
    skipped = collections.Counter()

    def cut(text: bytearray, start: int) -> int | None:
        return make_cutter(tokenizer).cut(
            text, start
        )  # made at the first long document

    pieces = read_pieces(sources, _reading(settings, skipped, cut))
    losses = Losses(settings.tokenizer, max_lost)
    encoded = encode_pieces(
        pieces,
        tokenizer,
        append_end=settings.append_end_of_document,
        workers=workers or _num_workers(tokenizer, sources),
    )
    # Closed at once, so that no worker outlives an error.
    with show_progress("tokenizing", total) as advance, contextlib.closing(encoded):
        splits = write_splits(
            folder,
            _reported(encoded, advance, losses),
            holdout=settings.holdout,
            holdout_by=settings.holdout_by,
            has_ends=settings.append_end_of_document,
            dtype=token_dtype(tokenizer.vocab_size),
            shard_tokens=settings.shard_tokens,
        )
    _check_splits(settings, splits, skipped)
    losses.check()
    return splits


def _reported(
    encoded: Iterator[Encoded], advance: Advance, losses: Losses
) -> Iterator[Encoded]:
    for each in encoded:
        losses.add(each.lost)
        yield each
        advance(sum(piece.source_bytes for piece in each.pieces), len(each.tokens))


def _num_workers(tokenizer: Tokenizer, sources: Sequence[Source]) -> int:
    if isinstance(tokenizer, BytesTokenizer):
        return 1  # sending bytes to a worker costs more than converting them
    cores = len(os.sched_getaffinity(0))
    if any(source.path == STDIN for source in sources):
        return cores
    return min(cores, 1 + sum(source.num_bytes for source in sources) // _WORKER_BYTES)


def _check_bounds(workers: int, max_lost: float):
    most = _WORKERS_A_CORE * (os.cpu_count() or 1)
    if not 0 <= workers <= most:
        raise InputError(
            f"--workers={workers} must be from 0, which is one a core, to {most}, "
            f"which is {_WORKERS_A_CORE} a core."
        )
    if not 0 <= max_lost <= 1:
        raise InputError(
            f"--max_lost={max_lost} must be from 0 to 1; 0.001 allows to lose one "
            "character in a thousand."
        )


def _check_splits(
    settings: TokenSettings, splits: dict[str, SplitEntry], skipped: collections.Counter
):
    if not splits:
        raise InputError(
            f"--input={','.join(settings.input)} holds no text; give files that do."
        )
    if "train" not in splits:
        raise InputError(
            f"--holdout={settings.holdout} --holdout_by={settings.holdout_by} leaves "
            "no text to train on; hold out less, or by tail, or give more text."
        )
    for reason, count in skipped.items():
        print(f"warning: {count} documents left out: {reason}.", file=sys.stderr)
    if settings.holdout and "eval" not in splits:
        print(
            f"warning: --holdout={settings.holdout} --holdout_by={settings.holdout_by} "
            f"holds out none of {splits['train'].num_documents} documents, so there is "
            "nothing to evaluate on; use --holdout_by=tail, or hold out more.",
            file=sys.stderr,
        )


def _check_same(output: str, done: Manifest, settings: TokenSettings):
    remedy = "give another --output, or --overwrite to replace it."
    if STDIN in settings.input:
        raise InputError(
            f"--output={output} is finished, and it cannot be known whether --input=- "
            f"is what it was made from; {remedy}"
        )
    now = dataclasses.asdict(settings)
    defaults = {each.name: each.default for each in dataclasses.fields(settings)}
    for name in now | done.settings:
        was, wanted = done.settings.get(name, defaults.get(name)), now.get(name)
        if was == wanted:
            continue
        if name.endswith("_sha256"):
            flag = name.removesuffix("_sha256")
            raise InputError(
                f"--output={output} was made from --{flag}={now[flag]} before it "
                f"changed; {remedy}"
            )
        raise InputError(
            f"--output={output} was made with --{name}={was}, not {wanted}; {remedy}"
        )


def _hash_tokenizer(name: str) -> str:
    if name == "bytes" or trained_vocab_size(name):
        return ""
    return load_tokenizer(name).sha256

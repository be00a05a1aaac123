# SPDX-License-Identifier: Apache-2.0
"""Progress of tokenization: a bar on a terminal, otherwise a line every few seconds."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LINE_EVERY_S = 5.0


class Advance(Protocol):
    """Reports bytes read, and tokens produced from them."""

    def __call__(self, num_bytes: int, num_tokens: int = 0) -> None: ...


@contextlib.contextmanager
def show_progress(title: str, total_bytes: int | None) -> Iterator[Advance]:
    """Shows progress on standard error; without a total, only amount and speed."""
    if sys.stderr.isatty():
        with _bar(title, total_bytes) as advance:
            yield advance
    else:
        yield _lines(title, total_bytes)


@contextlib.contextmanager
def _bar(title: str, total_bytes: int | None) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total_bytes, tokens=0)
        tokens = 0

        def advance(num_bytes: int, num_tokens: int = 0):
            nonlocal tokens
            tokens += num_tokens
            progress.update(task, advance=num_bytes, tokens=tokens)

        yield advance


def _lines(title: str, total_bytes: int | None) -> Advance:
    start = last = time.monotonic()
    done_bytes = tokens = 0

    def advance(num_bytes: int, num_tokens: int = 0):
        nonlocal last, done_bytes, tokens
        done_bytes += num_bytes
        tokens += num_tokens
        now = time.monotonic()
        if now - last < _LINE_EVERY_S:
            return
        last = now
        speed = done_bytes / (now - start)
        line = f"{title}: {done_bytes / 1e6:.1f} MB, {speed / 1e6:.1f} MB/s"
        if tokens:
            line += f", {tokens:,} tokens"
        if total_bytes and speed:
            left_s = max(total_bytes - done_bytes, 0) / speed
            line += f", {min(done_bytes / total_bytes, 1):.0%}, {left_s:.0f} s left"
        print(line, file=sys.stderr, flush=True)

    return advance

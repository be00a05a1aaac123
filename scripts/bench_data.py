# SPDX-License-Identifier: Apache-2.0
"""Times what reads of token files cost: opening, a sample, an evaluation, rows.

python scripts/bench_data.py --documents 10000000

Makes a Megatron pair of documents of 1 to 15 tokens in a temporary folder.
"""

import argparse
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import DataConfig
from jaxllm.data.batches import eval_batches
from jaxllm.data.formats import open_tokens
from jaxllm.data.packing import pack_all

END, LENGTH, BATCH = 0, 1024, 16


def write_pair(path: Path, num_documents: int) -> None:
    """Writes documents that end in one token, in Megatron's format."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 16, num_documents, "<i4")
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = rng.integers(1, 50_000, ends[-1], "<u2")
    tokens[ends - 1] = END
    tokens.tofile(path)
    with path.with_suffix(".idx").open("wb") as index:
        index.write(b"MMIDIDX\0\0" + struct.pack("<QB", 1, 8))
        index.write(struct.pack("<QQ", num_documents, num_documents + 1))
        lengths.tofile(index)
        ((ends - lengths) * 2).astype("<i8").tofile(index)
        np.arange(num_documents + 1, dtype="<i8").tofile(index)


def timed(name: str, action: Callable[[], Any]) -> Any:
    """Prints the seconds of an action, and returns what it does."""
    began_at_s = time.perf_counter()
    result = action()
    print(f"{name:<44} {time.perf_counter() - began_at_s:8.4f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, required=True)
    number = parser.parse_args().documents
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.bin"
        write_pair(path, number)
        size = path.stat().st_size / 1e9
        print(f"{number} documents, {size:.2f} GB of tokens")
        split = timed("open", lambda: open_tokens(str(path), "train"))
        config = DataConfig(
            paths=(str(path),), sequence_length=LENGTH, batch_size=BATCH
        )
        packed = timed("pack", lambda: pack_all(config, [split], keep_tail=True))
        batches = timed(
            "begin an evaluation",
            lambda: eval_batches(config, packed, sharding=None, num_batches=16),
        )
        timed("its first batch", lambda: next(batches))
        batches.close()
        rows = np.random.default_rng(1).integers(0, len(packed[0]), 1000)
        timed("1000 rows at random places", lambda: packed[0].read(rows))


if __name__ == "__main__":
    main()

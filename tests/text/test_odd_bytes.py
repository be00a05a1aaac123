# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes an input has, tokenize ends with 0, or with 2 and one message."""

import bz2
import gzip
import io
import json
import lzma
import random

import pyarrow
import pyarrow.parquet
import pytest

from jaxllm import tokenize

NUM_INPUTS = 300
NAMES = ("x.txt", "x.jsonl", "x.json", "x.parquet", "x", "x.md")
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
}
ATOMS = [
    *(b'{"text": "', b'"}', b"\n", b"[", b"]", b",", b'{"text": null}', b"{}", b"\x00"),
    *(b"\xff\xfe", b"\xef\xbb\xbf", "\u6c34\U0001f600".encode(), b"\xed\xa0\x80"),
    *(b"\\ud800", b"1e999", b"NaN", b"9" * 5000, b"[" * 3000, b"\\", b'"', b"\r", b" "),
    *(b"PAR1", b"\x1f\x8b", b"a", b"text ", b"<|endoftext|>", b"\xc2\x85", b"\xe2\x80"),
]


def parquet(draw: random.Random) -> bytes:
    columns = [
        ["a", None, "\u6c34"],
        [b"a", b"\xff"],
        [1, 2],
        [["a"], []],
        [{"text": "a"}],
        pyarrow.array([b"\xff\xfe", b"a"]).view(pyarrow.string()),
        pyarrow.array(["a", "b"]).dictionary_encode(),
    ]
    file = io.BytesIO()
    name = draw.choice(("text", "text", "body", "te.xt"))
    pyarrow.parquet.write_table(pyarrow.table({name: draw.choice(columns)}), file)
    return file.getvalue()


def content(draw: random.Random, name: str) -> bytes:
    if name == "x.parquet" and draw.random() < 0.8:
        data = parquet(draw)
    elif draw.random() < 0.4:
        rows = [{"text": draw.choice(("a", None, 1, "\u6c34"))} for _ in range(9)]
        data = json.dumps(rows).encode()
    else:
        data = b"".join(draw.choices(ATOMS, k=draw.randint(0, 12)))
    return data


def damaged(draw: random.Random, data: bytes) -> bytes:
    kind, at = draw.randint(0, 5), draw.randint(0, max(len(data) - 1, 0))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + draw.randbytes(3) + data[at + 3 :]
    return data


@pytest.mark.slow
def test_odd_bytes_never_show_a_traceback(tmp_path, capsys):
    draw = random.Random(12)
    ended = {0: 0, 2: 0}
    for number in range(NUM_INPUTS):
        name = draw.choice(NAMES)
        extension = draw.choice(list(COMPRESS)) if draw.random() < 0.4 else ""
        path = tmp_path / str(number) / (name + extension)
        path.parent.mkdir()
        data = damaged(draw, COMPRESS[extension](content(draw, name)))
        path.write_bytes(data)
        flags = [
            *("tokenize", f"--input={path}", f"--output={path.parent}/out"),
            f"--tokenizer={draw.choice(('bytes', 'bytes', 'bpe:257'))}",
            f"--holdout={draw.choice((0, 0.5))}",
            f"--skip_invalid_rows={draw.choice(('true', 'false'))}",
        ]
        status = tokenize.main(flags)
        error = capsys.readouterr().err
        assert "Traceback" not in error
        if status:
            lines = [each for each in error.splitlines() if each.startswith("error: ")]
            assert len(lines) == 1 and "--" in lines[0], (data, error)
            assert list(path.parent.iterdir()) == [path]
        ended[status] += 1
    assert min(ended.values()) > NUM_INPUTS // 10, ended

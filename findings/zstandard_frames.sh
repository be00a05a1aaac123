#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# zstandard 0.25.0: some ways of reading a .zst file give all of it, two only its first
# frame.
#
# Guess: `ZstdDecompressor` reads a file the same way by each of its methods, as `gzip`
#   reads all members of a .gz and the zstd command all frames.
# Seen: of two frames of 1000 lines each, `stream_reader`, `copy_stream` and
#   `zstandard.open` give 2000 lines; `read_to_iter`, which gives it in chunks, and
#   `decompress` give the first 1000 and end, without an error.
# For training: `cat a.zst b.zst` and parallel compressors write several frames. A
#   corpus then loses all but its first part, and the number of tokens is the only
#   trace. Read by `stream_reader`, and try the reader on two frames.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv" || exit 2
python=$folder/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check \
  zstandard==0.25.0 || exit 2
cd "$folder"

"$python" -I - <<'EOF'
import io
import sys

import zstandard

frame = zstandard.ZstdCompressor().compress(b"a line of text\n" * 1000)
file = frame * 2
reader = zstandard.ZstdDecompressor()


def copied():
    out = io.BytesIO()
    reader.copy_stream(io.BytesIO(file), out)
    return out.getvalue()


seen = {
    "stream_reader": reader.stream_reader(io.BytesIO(file)).read(),
    "copy_stream": copied(),
    "open": zstandard.open(io.BytesIO(file), "rb").read(),
    "read_to_iter": b"".join(reader.read_to_iter(io.BytesIO(file))),
    "decompress": reader.decompress(file),
}
lines = {method: text.count(b"\n") for method, text in seen.items()}
print("lines of 2000:", lines)
sys.exit(None if list(lines.values()) == [2000] * 3 + [1000] * 2 else "changed")
EOF

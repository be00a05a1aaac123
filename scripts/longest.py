# SPDX-License-Identifier: Apache-2.0
"""Prints the longest files and functions of the packages; fails on far too long ones.

python scripts/longest.py

A length is a place to stop and think, not a law: an idea is not cut in two for it. Only
beyond 400 lines of a file or 80 of a body is the exit status 1.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxllm", "pallas_kernels", "sharding")
FILE_LIMIT, BODY_LIMIT = 400, 80
NUM_SHOWN = 10

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main(arguments: list[str]) -> int:
    """Prints both lists, of this repository or of a folder that is named."""
    root = Path(arguments[0]) if arguments else ROOT
    sources = {
        path.relative_to(root).as_posix(): path.read_text()
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }
    files = {name: len(text.splitlines()) for name, text in sources.items()}
    bodies = {
        f"{name}:{function.lineno} {function.name}": body_length(function)
        for name, text in sources.items()
        for function in ast.walk(ast.parse(text))
        if isinstance(function, Function)
    }
    fits = show("lines of a file", files, FILE_LIMIT)
    fits &= show("lines of a function's body", bodies, BODY_LIMIT)
    return 0 if fits else 1


def body_length(function: Function) -> int:
    """Returns the lines of a function's body without its docstring."""
    body = function.body[ast.get_docstring(function) is not None :]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def show(what: str, lengths: dict[str, int], limit: int) -> bool:
    """Prints the longest of lengths; returns whether all are within the limit."""
    longest = sorted(lengths, key=lambda name: -lengths[name])
    too_long = [name for name in longest if lengths[name] > limit]
    print(f"{what}, of {len(lengths)}:")
    for name in longest[: max(NUM_SHOWN, len(too_long))]:
        over = f"  more than {limit}" if lengths[name] > limit else ""
        print(f"{lengths[name]:>6}  {name}{over}")
    return not too_long


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

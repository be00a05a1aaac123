# SPDX-License-Identifier: Apache-2.0
"""Public functions and classes say what they do, in one sentence to begin with."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    path.relative_to(ROOT).as_posix()
    for package in ("sharding", "pallas_kernels", "jaxllm")
    for path in sorted((ROOT / package).rglob("*.py"))
]


Documented = ast.FunctionDef | ast.ClassDef


def public(file: str) -> dict[str, Documented]:
    """Returns the public functions and classes of a file, and methods of the latter."""
    found = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            inner = [f for f in node.body if isinstance(f, ast.FunctionDef)]
            found |= {f"{node.name}.{f.name}": f for f in inner}
    return {
        name: node
        for name, node in found.items()
        if not any(part.startswith("_") for part in name.split("."))
    }


def is_property(node: Documented) -> bool:
    return any("property" in ast.unparse(d) for d in node.decorator_list)


@pytest.mark.parametrize("file", FILES)
def test_public_things_have_a_docstring(file):
    # The entry points' main does what the module's docstring says, and a property is
    # explained where its class is.
    for name, node in public(file).items():
        if name != "main" and not is_property(node):
            assert ast.get_docstring(node), name


@pytest.mark.parametrize("file", FILES)
def test_a_docstring_begins_with_one_sentence(file):
    for name, node in public(file).items():
        if text := ast.get_docstring(node):
            first = text.split("\n\n")[0]
            assert first.rstrip().endswith((".", ":")), name
            assert re.match(r"[A-Z0-9(`]", first), name


@pytest.mark.parametrize("file", FILES)
def test_documented_arguments_are_arguments(file):
    for name, node in public(file).items():
        if not isinstance(node, ast.FunctionDef):
            continue
        arguments = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
        text = ast.get_docstring(node) or ""
        match = re.search(r"Args:\n((?:  .*\n?)*)", text)
        listed = re.findall(r"^  (\w+(?:, \w+)*):", match[1] if match else "", re.M)
        for names in listed:
            assert set(names.split(", ")) <= arguments, f"{name}: {names}"

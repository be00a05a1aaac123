# SPDX-License-Identifier: Apache-2.0
"""Public functions and classes say what they do, in one sentence to begin with."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = [
    path.relative_to(ROOT).as_posix()
    for package in ("sharding", "pallas_kernels", "jaxllm")
    for path in sorted((ROOT / package).rglob("*.py"))
]


Documented = ast.FunctionDef | ast.ClassDef


@functools.cache
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


def test_public_things_have_a_docstring():
    # The entry points' main does what the module's docstring says, and a property is
    # explained where its class is.
    without = [
        f"{file}: {name}"
        for file in FILES
        for name, node in public(file).items()
        if name != "main" and not is_property(node) and not ast.get_docstring(node)
    ]
    assert without == []


def test_a_docstring_begins_with_one_sentence():
    found = []
    for file in FILES:
        for name, node in public(file).items():
            first = (ast.get_docstring(node) or "A.").split("\n\n")[0].rstrip()
            if not (first.endswith((".", ":")) and re.match(r"[A-Z0-9(`]", first)):
                found.append(f"{file}: {name}")
    assert found == []


def test_documented_arguments_are_arguments():
    found = []
    for file in FILES:
        for name, node in public(file).items():
            if isinstance(node, ast.FunctionDef):
                wrong = documented_arguments(node) - arguments(node)
                found += [f"{file}: {name}: {argument}" for argument in sorted(wrong)]
    assert found == []


def arguments(node: ast.FunctionDef) -> set[str]:
    return {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}


def documented_arguments(node: ast.FunctionDef) -> set[str]:
    match = re.search(r"Args:\n((?:  .*\n?)*)", ast.get_docstring(node) or "")
    listed = re.findall(r"^  (\w+(?:, \w+)*):", match[1] if match else "", re.M)
    return {name for names in listed for name in names.split(", ")}

# SPDX-License-Identifier: Apache-2.0
"""A name cannot lie: shape suffixes agree with the subscripts beside them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharding import LETTERS

ROOT = Path(__file__).parents[2]
FILES = [
    path.relative_to(ROOT).as_posix()
    for package in ("sharding", "pallas_kernels", "jaxllm")
    for path in sorted((ROOT / package).rglob("*.py"))
]
CONTRACTIONS = {"einsum", "project", "project_all", "_matmul"}
UNKNOWN = "?"  # a part of an f-string


def suffix(name: str) -> str | None:
    """Returns the shape in a name like x_BTD; None if it has none."""
    match = re.search(r"^[a-z0-9_]+_([A-Z0-9]*[A-Z][A-Z0-9]*)$", name)
    return match[1] if match else None


def lies(source: str) -> list[str]:
    """Returns what is wrong with the suffixes of a module, a line each."""
    tree = ast.parse(source)
    found = [
        f"{node.lineno}: {name} has dims that are not in the alphabet"
        for node, name in names(tree)
        if (shape := suffix(name)) and not set(shape) <= {*LETTERS, "1"}
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) in CONTRACTIONS:
            found += lies_of_operands(node)
        if isinstance(node, ast.Assign | ast.Return) and isinstance(
            node.value, ast.Call
        ):
            found += lies_of_result(node, node.value)
    return found


def names(tree: ast.AST) -> Iterator[tuple[ast.Name | ast.arg, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node, node.id
        elif isinstance(node, ast.arg):
            yield node, node.arg


def called(call: ast.Call) -> str:
    function = call.func
    return (
        function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
    )


def subscripts(call: ast.Call) -> tuple[list[str], str] | None:
    """Returns the operands' letters and the result's, where they are written out."""
    if not call.args:
        return None
    first = call.args[0]
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        text = first.value
    elif isinstance(first, ast.JoinedStr):
        parts = first.values
        text = "".join(
            str(part.value) if isinstance(part, ast.Constant) else UNKNOWN
            for part in parts
        )
    else:
        return None
    inputs, arrow, output = text.partition("->")
    return (inputs.split(","), output) if arrow else None


def lies_of_operands(call: ast.Call) -> list[str]:
    if (read := subscripts(call)) is None:
        return []
    found = []
    for letters, operand in zip(read[0], call.args[1:], strict=False):
        name = ast.unparse(operand)
        shape = suffix(name) if isinstance(operand, ast.Name) else None
        if shape and UNKNOWN not in letters and not agree(shape, letters):
            found.append(f"{call.lineno}: {name} is used as {letters}")
    for letters in (*read[0], read[1]):
        if unknown := {c for c in letters if c.isupper()} - set(LETTERS):
            found.append(f"{call.lineno}: {sorted(unknown)} of {letters} is no letter")
    return found


def lies_of_result(node: ast.Assign | ast.Return, call: ast.Call) -> list[str]:
    if called(call) not in CONTRACTIONS or (read := subscripts(call)) is None:
        return []
    if isinstance(node, ast.Return) or UNKNOWN in read[1]:
        return []
    found = []
    for target in node.targets:
        name = ast.unparse(target)
        shape = suffix(name) if isinstance(target, ast.Name) else None
        if shape and not agree(shape, read[1]):
            found.append(f"{node.lineno}: {name} is made as {read[1]}")
    return found


def agree(shape: str, letters: str) -> bool:
    """Compares dims; a 1 in a suffix is a dim of any letter that has size 1."""
    return len(shape) == len(letters) and all(
        a in (b, "1") for a, b in zip(shape, letters, strict=True)
    )


@pytest.mark.parametrize("file", FILES)
def test_suffixes_agree_with_subscripts_and_alphabet(file):
    assert lies((ROOT / file).read_text()) == []


def test_contractions_and_suffixes_are_found_at_all():
    sources = [(ROOT / file).read_text() for file in FILES]
    calls = [
        node
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and called(node) in CONTRACTIONS
    ]
    assert sum(subscripts(call) is not None for call in calls) >= 10
    shaped = {n for s in sources for _, n in names(ast.parse(s)) if suffix(n)}
    assert len(shaped) >= 50


@pytest.mark.parametrize(
    "lie",
    [
        'y_BTF = einsum("BTD,DF->BTF", x_BTF, w_DF)',
        'y_BTF = jnp.einsum("BTD,DF->BTF", x_BT, w)',
        'y_BTD = sharding.einsum("BTD,DF->BTF", x_BTD, w_DF)',
        'y_BTF = project("BTD,FD->BTF", x_BTD, w_DF)',
        'y = einsum("BTX,XF->BTF", x, w)',
        'y_BTV = project(f"BTD,{letters}->BTV", x_BTF, w)',
        'y_BTD = project(f"BTD,{letters}->BTV", x_BTD, w)',
        "x_BTQ = f()",
        "def f(x_BZ): pass",
        "x_B2 = f()",
    ],
)
def test_a_planted_lie_is_found(lie):
    assert lies(lie)


@pytest.mark.parametrize(
    "truth",
    [
        'y_BTF = einsum("BTD,DF->BTF", x_BTD, w_DF)',
        'y_BTV = project(f"BTD,{letters}->BTV", x_BTD, w)',
        "y = project(subscripts, x_BTD, w)",
        "y_B1 = x_BT",
        'y_B1F = einsum("BTD,DF->BTF", x_B1D, w_DF)',
        'x = einsum("lij,lkj->lik", x, x)',
        "key_11S = f()",
        "FLOAT_MAX = MAX_BYTES",
    ],
)
def test_the_truth_is_let_through(truth):
    assert not lies(truth)

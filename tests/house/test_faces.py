# SPDX-License-Identifier: Apache-2.0
"""One import path a name: what a package's `__init__` hands out, no other one does."""

import ast
import functools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("sharding", "pallas_kernels", "jaxllm")

# A face that collects those of its folders: users call its operations, and need not
# know that each has a folder.
COLLECTS = ("pallas_kernels",)


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Returns every module of the three packages by name; a face ends with a dot."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            tree = ast.parse(path.read_text())
            found[name.removesuffix("__init__")] = tree
    return found


def handed_out(face: ast.Module) -> list[str]:
    """Returns the names of `__all__`."""
    return [
        name
        for node in face.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
    ]


def imported(module: ast.Module) -> dict[str, str]:
    """Returns where each name comes from that a module imports from another."""
    return {
        alias.asname or alias.name: str(node.module)
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def on_two_paths(modules: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """Returns the names that several faces hand out, with these faces."""
    faces = defaultdict(list)
    for module, tree in modules.items():
        for name in handed_out(tree):
            faces[name].append(module)
    for collector in (f"{name}." for name in COLLECTS if f"{name}." in modules):
        for name, place in imported(modules[collector]).items():
            if place.startswith(collector) and f"{place}." in faces[name]:
                faces[name].remove(collector)
    return {name: places for name, places in faces.items() if len(places) > 1}


def passed_on(modules: Mapping[str, ast.Module]) -> list[str]:
    """Returns imports of a name from a module that is no face and has imported it."""
    return [
        f"{module} imports {name} from {place}, which has it from elsewhere"
        for module, tree in modules.items()
        for name, place in imported(tree).items()
        if place in modules and name in imported(modules[place])
    ]


def test_no_name_is_handed_out_by_two_faces():
    faces = {
        name: len(handed_out(t)) for name, t in sources().items() if name[-1] == "."
    }
    assert len(faces) >= 20 and sum(faces.values()) > 80, faces
    assert on_two_paths(sources()) == {}


def test_a_name_is_imported_from_a_face_or_from_where_it_is_made():
    assert passed_on(sources()) == []


def test_a_face_hands_out_all_that_it_imports():
    for name, tree in sources().items():
        if name.endswith("."):
            names = handed_out(tree)
            assert len(names) == len(set(names)), name
            assert imported(tree).keys() <= set(names), name


@pytest.mark.parametrize(
    "extra, wrong",
    [
        ({}, []),
        ({"jaxllm.b.": "from jaxllm.errors import E\n__all__ = ['E']"}, ["E"]),
        # What collects takes the names of its own folders only.
        ({"pallas_kernels.": "from jaxllm.errors import E\n__all__ = ['E']"}, ["E"]),
        ({"pallas_kernels.": "from pallas_kernels.o import f\n__all__ = ['f']"}, []),
        ({"sharding.": "from pallas_kernels.o import f\n__all__ = ['f']"}, ["f"]),
    ],
)
def test_a_planted_second_path_is_found(extra, wrong):
    planted = {
        "jaxllm.a.": "from jaxllm.errors import E\n__all__ = ['E']",
        "pallas_kernels.o.": "from pallas_kernels.o.op import f\n__all__ = ['f']",
        **extra,
    }
    modules = {name: ast.parse(source) for name, source in planted.items()}
    assert list(on_two_paths(modules)) == wrong


def test_a_planted_name_that_is_passed_on_is_found():
    planted = {
        "errors": "class E: pass",
        "flags": "from errors import E",
        "train": "from flags import E",
        "right": "from errors import E",
    }
    modules = {name: ast.parse(source) for name, source in planted.items()}
    assert passed_on(modules) == [
        "train imports E from flags, which has it from elsewhere"
    ]

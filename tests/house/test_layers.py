# SPDX-License-Identifier: Apache-2.0
"""The dependency table of the design, read from the source."""

import ast
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("sharding", "pallas_kernels", "jaxllm")

# Imported only where a config or a file asks for them: extras of pyproject.toml, and
# libraries that the kernels are timed beside where they happen to be installed.
EXTRAS = {
    "pyarrow": "jaxllm.text.documents",
    "wandb": "jaxllm.records.metrics",
    **dict.fromkeys(("torch", "tokamax", "liger_kernel"), "pallas_kernels.bench.peers"),
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def sources() -> dict[str, Path]:
    """Returns every module of the three packages by name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(sources()[name].read_text())


MODULES = list(sources())
every_module = pytest.mark.parametrize("name", MODULES)


@functools.cache
def imports(name: str) -> frozenset[str]:
    """Returns the modules that a module imports: ours by module, others by package."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in sources() else str(node.module))
    return frozenset(n if n in sources() else n.partition(".")[0] for n in found)


def ours(name: str) -> set[str]:
    return {found for found in imports(name) if found.partition(".")[0] in PACKAGES}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table in docs/how-it-works.md: a folder, or a file."""

    place: str  # a dotted name; everything below it that no other row has
    libraries: frozenset[str]
    number: int


@functools.cache
def table() -> list[Row]:
    """Reads the rows of the table, from the ground up."""
    lines = (ROOT / "docs" / "how-it-works.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| folder |"))
    rows = []
    for number, line in enumerate(lines[first + 2 :]):
        if not line.startswith("|"):
            break
        path, _, libraries = (cell.strip() for cell in line.strip("|").split("|"))
        place = path.strip("`").rstrip("/").removesuffix(".py").replace("/", ".")
        words = libraries.replace(",", " ").split() if libraries != "none" else []
        allowed = frozenset(words) | {"jax", "numpy"}
        if libraries == "standard library only":
            allowed = frozenset()
        rows.append(Row(place, allowed, number))
    return rows


def row(name: str) -> Row:
    """Returns the row of the most specific place that covers a module."""
    covering = [r for r in table() if name == r.place or name.startswith(r.place + ".")]
    assert covering, f"{name} is in no row"
    return max(covering, key=lambda r: len(r.place))


def test_the_table_has_a_row_for_each_folder():
    folders = {
        ".".join(path.relative_to(ROOT).parts)
        for path in (ROOT / "jaxllm").iterdir()
        if (path / "__init__.py").exists()
    }
    assert folders <= {r.place for r in table()}
    assert all(
        (ROOT / r.place.replace(".", "/")).exists() or r.place in sources()
        for r in table()
    )


@every_module
def test_a_module_imports_from_rows_above_and_from_its_own_folder(name):
    mine = row(name)
    for other in map(row, ours(name) - {"jaxllm"}):
        assert other == mine or other.number < mine.number, (
            f"{name} imports {other.place}, which is not above {mine.place}"
        )


@every_module
def test_third_party_packages_are_imported_where_the_table_says(name):
    extras = {extra for extra, place in EXTRAS.items() if place == name}
    found = imports(name) - ours(name) - extras - set(sys.stdlib_module_names)
    assert found <= row(name).libraries


@every_module
def test_an_extra_is_imported_by_its_name_where_the_table_says(name):
    for node in ast.walk(tree(name)):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "importlib.import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            package = str(node.args[0].value).partition(".")[0]
            assert EXTRAS.get(package) == name, f"{name} may not import {package}"


@every_module
def test_nobody_imports_a_command(name):
    commands = {n for n in MODULES if row(n).place == "jaxllm"} - {"jaxllm"}
    assert not ours(name) & commands


def test_the_imports_have_no_cycle():
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]):
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for other in sorted(ours(name)):
            visit(other, (*path, name))
        done.append(name)

    for name in MODULES:
        visit(name, ())
    assert sorted(done) == sorted(MODULES)


def functions(name: str) -> Iterator[Function]:
    for node in ast.walk(tree(name)):
        if isinstance(node, Function):
            yield node


@every_module
def test_no_import_is_inside_a_function_or_for_type_checkers_only(name):
    assert "TYPE_CHECKING" not in sources()[name].read_text()
    for function in functions(name):
        inner = {
            node.names[0].name.partition(".")[0]
            for node in ast.walk(function)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        allowed = {extra for extra, place in EXTRAS.items() if place == name}
        assert inner <= allowed, f"{function.name} imports {inner - allowed}"


@every_module
def test_a_file_has_at_most_300_lines(name):
    assert len(sources()[name].read_text().splitlines()) <= 300


def num_lines(function: Function) -> int:
    """Counts the lines of a body without its docstring."""
    body = function.body[ast.get_docstring(function) is not None :]
    return function.end_lineno - body[0].lineno + 1 if body else 0  # pyright: ignore[reportOptionalOperand]


@every_module
def test_a_function_has_at_most_60_lines_or_80_with_a_kernel(name):
    limit = 80 if name.startswith("pallas_kernels.") else 60
    long = {f.name: num_lines(f) for f in functions(name) if num_lines(f) > limit}
    assert not long


def test_the_loop_is_one_screen_and_calls_the_compiled_step_itself():
    (story,) = [f for f in functions("jaxllm.train") if f.name == "train"]
    assert num_lines(story) <= 45
    calls = [node for node in ast.walk(story) if isinstance(node, ast.Call)]
    calls.sort(key=lambda node: (node.lineno, node.col_offset))
    order = ["run.evaluate", "run.save", "run.next_batch", "run.step", "run.log"]
    names = [ast.unparse(call.func) for call in calls]
    assert [name for name in names if name in order][: len(order)] == order


@every_module
def test_a_module_is_licensed_documented_and_ascii(name):
    text = sources()[name].read_text()
    assert text.isascii()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(tree(name))


def test_no_module_is_named_for_nothing():
    words = {"utils", "util", "common", "misc", "helpers", "manager"}
    assert not words & {part for name in MODULES for part in name.split(".")}

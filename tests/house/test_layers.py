# SPDX-License-Identifier: Apache-2.0
"""The dependency table of the design, read from the source."""

import ast
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("sharding", "pallas_kernels", "jaxllm")

# Imported only where a config or a file asks for them: extras of pyproject.toml, and
# libraries that the kernels are timed beside where they happen to be installed.
EXTRAS = {
    "pyarrow": "jaxllm.text.streams",
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


@functools.cache
def nodes(name: str) -> list[ast.AST]:
    return list(ast.walk(tree(name)))


MODULES = list(sources())


def test_all_modules_are_looked_at():
    assert len(MODULES) > 100
    assert {name.partition(".")[0] for name in MODULES} == set(PACKAGES)


@functools.cache
def imports(name: str) -> frozenset[str]:
    """Returns the modules that a module imports: ours by module, others by package."""
    found = set()
    for node in nodes(name):
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


def test_a_module_imports_from_rows_above_and_from_its_own_folder():
    wrong = [
        f"{name} imports {other.place}, which is not above {mine.place}"
        for name in MODULES
        for mine, other in ((row(name), row(n)) for n in ours(name) - {"jaxllm"})
        if other != mine and other.number >= mine.number
    ]
    assert wrong == []


def extras(name: str) -> set[str]:
    return {extra for extra, place in EXTRAS.items() if place == name}


def test_third_party_packages_are_imported_where_the_table_says():
    wrong = {
        name: found
        for name in MODULES
        if (found := third_party(name) - row(name).libraries)
    }
    assert wrong == {}


def third_party(name: str) -> frozenset[str]:
    return imports(name) - ours(name) - extras(name) - set(sys.stdlib_module_names)


def test_an_extra_is_imported_by_its_name_where_the_table_says():
    wrong = [
        f"{name} may not import {package}"
        for name in MODULES
        for package in imported_by_name(name) - extras(name)
    ]
    assert wrong == []


def imported_by_name(name: str) -> set[str]:
    return {
        str(node.args[0].value).partition(".")[0]
        for node in nodes(name)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "importlib.import_module"
        and isinstance(node.args[0], ast.Constant)
    }


def test_nobody_imports_a_command():
    commands = {n for n in MODULES if row(n).place == "jaxllm"} - {"jaxllm"}
    wrong = {name: ours(name) & commands for name in MODULES if ours(name) & commands}
    assert wrong == {}


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
    for node in nodes(name):
        if isinstance(node, Function):
            yield node


def test_no_import_is_inside_a_function_or_for_type_checkers_only():
    wrong = [
        f"{name}: {function.name} imports {inner}"
        for name in MODULES
        for function in functions(name)
        for inner in imported_inside(function) - extras(name)
    ]
    wrong += [n for n in MODULES if "TYPE_CHECKING" in sources()[n].read_text()]
    assert wrong == []


def imported_inside(function: Function) -> set[str]:
    return {
        node.names[0].name.partition(".")[0]
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }


def test_the_loop_is_one_screen_and_calls_the_compiled_step_itself():
    (story,) = [f for f in functions("jaxllm.train") if f.name == "train"]
    assert num_lines(story) <= 45
    calls = [node for node in ast.walk(story) if isinstance(node, ast.Call)]
    calls.sort(key=lambda node: (node.lineno, node.col_offset))
    order = ["run.evaluate", "run.save", "run.next_batch", "run.step", "run.log"]
    names = [ast.unparse(call.func) for call in calls]
    places = [names.index(name) for name in order]
    assert places == sorted(places)


def num_lines(function: Function) -> int:
    """Counts the lines of a body without its docstring."""
    body = function.body[ast.get_docstring(function) is not None :]
    return function.end_lineno - body[0].lineno + 1 if body else 0  # pyright: ignore[reportOptionalOperand]


def test_a_module_is_licensed_documented_and_ascii():
    wrong = []
    for name in MODULES:
        text = sources()[name].read_text()
        if not text.isascii():
            wrong.append(f"{name} is not ASCII")
        if not text.startswith("# SPDX-License-Identifier: Apache-2.0\n"):
            wrong.append(f"{name} does not begin with its license")
        if not ast.get_docstring(tree(name)):
            wrong.append(f"{name} has no docstring")
    assert wrong == []


def test_no_module_is_named_for_nothing():
    words = {"utils", "util", "common", "misc", "helpers", "manager"}
    assert not words & {part for name in MODULES for part in name.split(".")}

# SPDX-License-Identifier: Apache-2.0
"""The dependency table of the design, read from the source."""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sharding", "pallas_kernels", "jaxllm")

# Lowest first. A module imports modules of lower layers, and of its own layer only
# where that makes no cycle. A name covers the modules below it.
LAYERS = (
    ("sharding", "pallas_kernels"),
    ("jaxllm.errors",),
    ("jaxllm.config.checks", "jaxllm.records.json_lines"),
    ("jaxllm.config.model",),
    ("jaxllm.config",),
    (
        "jaxllm.config.presets",
        "jaxllm.config.fields",
        "jaxllm.run.compilation_cache",
        "jaxllm.cluster.environment",
    ),
    ("jaxllm.config.files", "jaxllm.records.console", "jaxllm.resilience"),
    ("jaxllm.config.saved", "jaxllm.cluster.launch"),
    ("jaxllm.cluster.agreement",),
    ("jaxllm.cluster.membership",),
    ("jaxllm.models", "jaxllm.data", "jaxllm.plan.budget", "jaxllm.records.metrics"),
    ("jaxllm.inspect.traces",),
    ("jaxllm.inspect.timeline",),
    ("jaxllm.inspect.profiler",),
    (
        "jaxllm.step.muon",
        "jaxllm.step.optimizer",
        "jaxllm.step.loss",
        "jaxllm.run.workdir",
    ),
    ("jaxllm.step.bounds", "jaxllm.step.microbatches"),
    ("jaxllm.plan.kernels",),
    ("jaxllm.step", "jaxllm.checkpoint"),
    ("jaxllm.run.saved_model", "jaxllm.inference.sampling", "jaxllm.plan.cost"),
    ("jaxllm.inspect.diagnosis",),
    ("jaxllm.flags", "jaxllm.run.saves", "jaxllm.cluster.stragglers"),
    ("jaxllm.evaluate", "jaxllm.generate"),
    ("jaxllm.run.run",),
    ("jaxllm.run.startup",),
    ("jaxllm.train", "jaxllm.tokenize", "jaxllm.compare_meshes", "jaxllm.ledger"),
    ("jaxllm.replay",),
    ("jaxllm.checkpoint.__main__",),
)
STANDARD_LIBRARY_ONLY = (
    *("jaxllm.errors", "jaxllm.config.checks", "jaxllm.config.model", "jaxllm.config"),
    *("jaxllm.config.presets", "jaxllm.config.fields", "jaxllm.config.files"),
    "jaxllm.config.saved",
)
# Third-party package -> where it may be imported.
USERS = {
    "flax": ("jaxllm.models",),
    "optax": ("jaxllm.step.optimizer", "jaxllm.step.bounds", "jaxllm.step"),
    "orbax": ("jaxllm.checkpoint",),
    "grain": ("jaxllm.data",),
    "absl": (
        *("jaxllm.flags", "jaxllm.train", "jaxllm.tokenize"),
        *("jaxllm.evaluate", "jaxllm.generate", "jaxllm.compare_meshes"),
        "jaxllm.replay",
    ),
    "tensorboard": ("jaxllm.records.metrics",),
    "tokenizers": ("jaxllm.text.tokenizers",),
    "rich": ("jaxllm.records.console", "jaxllm.text.progress"),
    "numpy": PACKAGES,
    "jax": PACKAGES,
}
# Extras of pyproject.toml, imported where a config or a file asks for them; and other
# libraries that the kernels are timed beside, where they happen to be installed.
EXTRAS = {
    "pyarrow": "jaxllm.text.documents",
    "wandb": "jaxllm.records.metrics",
    **dict.fromkeys(("torch", "tokamax", "liger_kernel"), "pallas_kernels.bench.peers"),
}
NOBODY_IMPORTS = (
    *("jaxllm.train", "jaxllm.tokenize", "jaxllm.generate"),
    *("jaxllm.compare_meshes", "jaxllm.ledger", "jaxllm.replay"),
)

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


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def layer(name: str) -> int:
    """Returns the layer of the most specific name that covers a module."""
    covering = [
        (len(each), i)
        for i, names in enumerate(LAYERS)
        for each in names
        if within(name, (each,))
    ]
    assert covering, f"{name} is in no layer"
    return max(covering)[1]


@every_module
def test_a_module_is_in_one_layer_and_imports_no_higher_one(name):
    if name == "jaxllm":
        assert not imports(name)
        return
    for other in ours(name) - {"jaxllm"}:
        assert layer(other) <= layer(name), f"{name} imports {other} of a higher layer"


@every_module
def test_third_party_packages_are_imported_where_the_table_says(name):
    extras = {extra for extra, place in EXTRAS.items() if place == name}
    for other in imports(name) - ours(name) - extras - set(sys.stdlib_module_names):
        assert other in USERS, (
            f"{name} imports {other}, which is in no row of the table"
        )
        assert within(name, USERS[other]), f"{name} may not import {other}"


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


@pytest.mark.parametrize("name", STANDARD_LIBRARY_ONLY)
def test_a_config_can_be_read_without_jax(name):
    allowed = {*STANDARD_LIBRARY_ONLY, "jaxllm"}
    assert imports(name) - set(sys.stdlib_module_names) <= allowed


@every_module
def test_the_two_lowest_packages_import_jax_and_themselves_only(name):
    package = name.partition(".")[0]
    if package == "jaxllm":
        return
    for other in imports(name) - set(sys.stdlib_module_names) - {"jax", "numpy"}:
        assert other.partition(".")[0] == package, f"{name} imports {other}"


@every_module
def test_nobody_imports_an_entry_point(name):
    assert not ours(name) & set(NOBODY_IMPORTS)


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


def test_the_loop_is_one_screen():
    story = [f for f in functions("jaxllm.train") if f.name in ("train", "_to_the_end")]
    assert len(story) == 2
    assert sum(map(num_lines, story)) <= 45


@every_module
def test_a_module_is_licensed_documented_and_ascii(name):
    text = sources()[name].read_text()
    assert text.isascii()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(tree(name))


def test_no_module_is_named_for_nothing():
    words = {"utils", "util", "common", "misc", "helpers", "manager"}
    assert not words & {part for name in MODULES for part in name.split(".")}

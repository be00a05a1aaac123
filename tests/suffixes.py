# SPDX-License-Identifier: Apache-2.0
"""Shape suffixes compared with the letters that are written out beside them.

Read from the source only. What a name says (`x_BTD`) is one side of a comparison; the
other is a subscript, a spec, the declared axes of a parameter, a variable of a shape,
or the suffix of the parameter that an argument is passed to.
"""

import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from sharding import LETTERS

UNKNOWN = "?"  # a part of an f-string

# Each is called with subscripts and their operands.
CONTRACTIONS = {"einsum", "project", "project_all", "_project_forward", "_matmul"}
# Each is called with an array and its letters.
PLACEMENTS = {"constrain", "gather", "reduce_to_storage"}
# Each returns an array of the dims of its first argument.
ELEMENTWISE = {
    *("abs", "exp", "gelu", "isfinite", "isneginf", "log", "negative", "sigmoid"),
    *("silu", "softmax", "sqrt", "square", "tanh", "zeros_like", "ones_like"),
    *("add_bias", "checkpoint_name", "place_like", "psum", "stop_gradient"),
}
# Two letters of one size: a token's own position is a query's and a key's, and the
# experts are those that the router compares.
SAME_SIZE = ("TS", "ER")
# Two letters that one dim of a function's parameters stands for.
GENERIC = {
    # Decoding: as many heads as keys have, and all queries of a group in T.
    "attention_with_gradient": "NK",
    "rotate": "NK",
    "rows_times_weights": "DF",  # backward from F to D
    "_within_groups": "DF",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Binding = tuple[Any, ast.AST | None]  # a statement, and the value or function
Parameters = tuple[list[str], list[str]]  # by position, and by name only


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a name says of dims, and what is written beside it."""

    kind: str
    line: int
    what: str
    shape: str
    letters: str
    same: tuple[str, ...] = ()  # pairs of letters that may stand for each other here

    @property
    def agrees(self) -> bool:
        """Whether dims are equal; a 1 in a name is a dim of any letter of size 1."""
        return len(self.shape) == len(self.letters) and all(
            mine in (other, "1") or {mine, other} in map(set, self.same)
            for mine, other in zip(self.shape, self.letters, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.line}: {self.what}, {self.kind}, is {self.letters or 'a number'}"


def suffix(name: str) -> str | None:
    """Returns the shape in a name like x_BTD; None if it has none."""
    match = re.search(r"^[a-z0-9_]+_([A-Z0-9]*[A-Z][A-Z0-9]*)$", name)
    return match[1] if match else None


def lies(source: str) -> list[str]:
    """Returns what is wrong with the suffixes of a module alone, a line each."""
    module = Module(ast.parse(source))
    return module.unknown_letters() + [
        str(one) for one in module.comparisons({}) if not one.agrees
    ]


class Module:
    """A module's tree, with what a name in it stands for."""

    def __init__(self, tree: ast.Module):
        self.tree = tree
        self.nodes = list(ast.walk(tree))
        self.parents = {
            child: node for node in self.nodes for child in ast.iter_child_nodes(node)
        }
        self.imported = dict(_imported(self.nodes))  # name here -> module, name there
        self.parameters = dict(self._parameters())  # of what others may call
        self._bindings: dict[ast.AST, dict[str, list[Binding]]] = {}  # by scope

    def unknown_letters(self) -> list[str]:
        """Returns the names and subscripts whose letters are not in the alphabet."""
        found = []
        for node in self.nodes:
            name = node.id if isinstance(node, ast.Name) else None
            name = node.arg if isinstance(node, ast.arg) else name
            if name and (shape := suffix(name)) and not set(shape) <= {*LETTERS, "1"}:
                found.append(f"{name} has dims that are not in the alphabet")
            if isinstance(node, ast.Call) and called(node) in CONTRACTIONS:
                ins, outs = self.subscripts(node) or ((), ())
                used = {letter for letter in "".join(ins + outs) if letter.isupper()}
                if unknown := sorted(used - set(LETTERS)):
                    found.append(f"{node.lineno}: subscripts {unknown} are no letters")
        return found

    def comparisons(self, modules: Mapping[str, "Module"]) -> Iterator[Comparison]:
        """Yields all of this module; modules say what its imports take."""
        for node in self.nodes:
            if isinstance(node, ast.Call):
                if called(node) in CONTRACTIONS:
                    yield from self._contraction(node)
                elif called(node) in PLACEMENTS:
                    yield from self._placement(node)
                elif called(node) == "local":
                    yield from self._local(node)
                elif called(node) in ("matrix", "vector"):
                    yield from self._declaration(node)
                yield from self._arguments(node, modules)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    yield from self._assignment(target, node.value)

    # One method for each kind of place.

    def _contraction(self, call: ast.Call) -> Iterator[Comparison]:
        if (read := self.subscripts(call)) is None:
            return
        named = {k.arg: k.value for k in call.keywords}
        operands = [*call.args[1:]] if call.args else []
        operands += [named[name] for name in ("x", "w", "weights") if name in named]
        if "subscripts" in named:
            operands = [*call.args, *operands]
        flat = self.flat(operands)[: len(read[0])]
        yield from self._pairs("contraction's operand", flat, read[0])
        yield from self._results("contraction's result", call, read[1])

    def _placement(self, call: ast.Call) -> Iterator[Comparison]:
        if len(call.args) < 2 or (letters := self.letters(call.args[1])) is None:
            return
        yield from self._pairs("placement", call.args[:1], [letters])
        yield from self._results("placement's result", call, (letters,))

    def _local(self, call: ast.Call) -> Iterator[Comparison]:
        if len(call.args) < 3:
            return
        function, ins, outs = call.args
        letters = [self.letters(entry) for entry in self.flat([ins])]
        function = self.value(function) if isinstance(function, ast.Name) else function
        if isinstance(function, Function):
            names, _ = parameters_of(function)
            yield from self._names("block's parameter", call, names, letters)
        results = tuple(self.letters(entry) for entry in self.flat([outs]))
        for returned in returns(function) if isinstance(function, Function) else ():
            flat = self.flat([returned])
            if len(flat) == len(results):
                yield from self._pairs("block's result", flat, results)
        for use in self._calls_of(call):
            flat = self.elements(use.args)
            yield from self._pairs("block's argument", flat, letters)
            yield from self._results("block's result", use, results)

    def _declaration(self, call: ast.Call) -> Iterator[Comparison]:
        if len(call.args) > 2 and (axes := self.letters(call.args[2])) is not None:
            dims = self.flat([call.args[1]])
            yield from self._dims("shape of a parameter", call, dims, axes)

    def _arguments(
        self, call: ast.Call, modules: Mapping[str, "Module"]
    ) -> Iterator[Comparison]:
        if (names := self._taken_by(call, modules)) is None:
            return
        positional, others = names
        pairs = [*zip(positional, self.elements(call.args), strict=False)]
        pairs += [
            (keyword.arg, keyword.value)
            for keyword in call.keywords
            if keyword.arg in (*positional, *others)
        ]
        generic = GENERIC.get(called(call))
        same = (*SAME_SIZE, generic) if generic else SAME_SIZE
        for name, argument in pairs:
            shape, said = suffix(name), self.shape(argument)
            if shape and said is not None and UNKNOWN not in said:
                text = f"{name}={ast.unparse(argument)}"
                yield Comparison("argument", call.lineno, text, shape, said, same)

    def _assignment(self, target: ast.expr, value: ast.expr) -> Iterator[Comparison]:
        if isinstance(value, ast.Attribute) and value.attr == "shape":
            if (shape := self.shape(value.value)) and isinstance(target, ast.Tuple):
                yield from self._dims("size", target, target.elts, shape)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            if len(target.elts) == len(value.elts):
                for one, other in zip(target.elts, value.elts, strict=True):
                    yield from self._assignment(one, other)
        elif isinstance(target, ast.Name) and not is_compared_elsewhere(value):
            if (said := self.shape(value)) is not None:
                yield from self._pairs("assignment", [target], [said])

    # Two lists, side by side.

    def _pairs(
        self,
        kind: str,
        expressions: Sequence[ast.expr],
        letters: Sequence[str | None],
    ) -> Iterator[Comparison]:
        for one, said in zip(expressions, letters, strict=False):
            shape = self.shape(one)
            if shape is None or said is None or UNKNOWN in said + shape:
                continue
            name = ast.unparse(one)
            of_model = name.startswith("self.") and name.endswith("[...]")
            what = f"{kind}, a parameter" if of_model else kind
            yield Comparison(what, one.lineno, name, shape, said)

    def _results(
        self, kind: str, call: ast.Call, letters: Sequence[str | None]
    ) -> Iterator[Comparison]:
        node = self.parents.get(call)
        if not isinstance(node, ast.Assign):
            return
        for target in node.targets:
            is_tuple = isinstance(target, ast.Tuple)
            flat = target.elts if is_tuple else [target]
            if len(flat) == len(letters):
                yield from self._pairs(kind, flat, letters)

    def _names(
        self,
        kind: str,
        node: ast.expr,
        names: Sequence[str],
        letters: Sequence[str | None],
    ) -> Iterator[Comparison]:
        for name, said in zip(names, letters, strict=False):
            if (shape := suffix(name)) and said is not None and UNKNOWN not in said:
                yield Comparison(kind, node.lineno, name, shape, said)

    def _dims(
        self, kind: str, node: ast.expr, dims: Sequence[ast.expr], shape: str
    ) -> Iterator[Comparison]:
        """Variables of one letter, such as `b, t, d`, and those that are longer."""
        names = [ast.unparse(dim) for dim in dims]
        letters = [name.upper() if len(name) == 1 else "" for name in names]
        if not any(letter in LETTERS for letter in letters) or "*" in "".join(names):
            return
        said = [
            letter if letter in LETTERS else shape[i : i + 1]
            for i, letter in enumerate(letters)
        ]
        text = ", ".join(names)
        yield Comparison(kind, node.lineno, text, "".join(said), shape, SAME_SIZE)

    # What an expression says.

    def shape(self, node: ast.expr) -> str | None:
        """Returns the dims that an expression says it has."""
        if isinstance(node, ast.Name):
            return suffix(node.id)
        if isinstance(node, ast.Attribute):
            return suffix(node.attr)
        if isinstance(node, ast.Subscript):
            if ast.unparse(node.slice) == "...":
                return self._declared_axes(node.value)
            shape = self.shape(node.value)
            return None if shape is None else indexed(shape, node.slice)
        if isinstance(node, ast.IfExp):
            either = {self.shape(node.body), self.shape(node.orelse)}
            return either.pop() if len(either) == 1 else None
        if isinstance(node, ast.Call):
            return self._shape_of_call(node)
        return None

    def _shape_of_call(self, call: ast.Call) -> str | None:
        name = called(call)
        if name == "astype" and isinstance(call.func, ast.Attribute):
            return self.shape(call.func.value)
        if name in ELEMENTWISE and call.args:
            return self.shape(call.args[0])
        if name in PLACEMENTS and len(call.args) > 1:
            return self.letters(call.args[1])
        if name in CONTRACTIONS - {"project_all", "_project_forward"}:
            read = self.subscripts(call)
            return read[1][0] if read else None
        return None

    def _declared_axes(self, node: ast.expr) -> str | None:
        """Returns the axes that the class declares where it makes this attribute."""
        owner = self.enclosing(node, ast.ClassDef)
        if not isinstance(node, ast.Attribute) or owner is None:
            return None
        found = {
            self.letters(made.value.args[2])
            for made in ast.walk(owner)
            if isinstance(made, ast.Assign)
            and ast.unparse(made.targets[0]) == ast.unparse(node)
            and isinstance(made.value, ast.Call)
            and called(made.value) in ("matrix", "vector")
        }
        return found.pop() if len(found) == 1 else None

    def letters(self, node: ast.expr) -> str | None:
        """Returns letters that are written out, here or where a name gets its value."""
        value = self.value(node) if isinstance(node, ast.Name) else node
        if isinstance(value, ast.JoinedStr):
            return "".join(
                str(part.value) if isinstance(part, ast.Constant) else UNKNOWN
                for part in value.values
            )
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value
        return None

    def subscripts(self, call: ast.Call) -> tuple[tuple, tuple] | None:
        """Returns the operands' letters and the results', if they are written out."""
        first = [k.value for k in call.keywords if k.arg == "subscripts"] + call.args
        text = self.letters(first[0]) if first else None
        if text is None or "->" not in text:
            return None
        inputs, _, outs = text.partition("->")
        return tuple(inputs.split(",")), tuple(outs.split(","))

    def elements(self, items: Sequence[ast.expr]) -> list[ast.expr]:
        """Returns items, with the elements of starred tuples and of names of them.

        It ends before the first whose number is not known.
        """
        found, left = [], [*items]
        while left:
            item = left.pop(0)
            if not isinstance(item, ast.Starred):
                found.append(item)
            elif (inside := self.inside(item.value)) is not None:
                left = [*inside, *left]
            else:
                break
        return found

    def inside(self, node: ast.expr) -> list[ast.expr] | None:
        """Returns the elements of a tuple, or of the one that a name stands for."""
        value = self.value(node) if isinstance(node, ast.Name) else node
        return value.elts if isinstance(value, ast.Tuple | ast.List) else None

    def flat(self, items: Sequence[ast.expr]) -> list[ast.expr]:
        """Returns `elements`, and those of tuples among them."""
        found = []
        for item in self.elements(items):
            inside = self.inside(item)
            found += [item] if inside is None else self.elements(inside)
        return found

    # What a name stands for.

    def enclosing(self, node: ast.AST, *kinds: type[ast.AST]) -> ast.AST | None:
        """Returns the innermost node of some kinds around another."""
        around = self.parents.get(node)
        while around is not None and not isinstance(around, kinds):
            around = self.parents.get(around)
        return around

    def value(self, name: ast.Name) -> ast.AST | None:
        """Returns the function, or the expression, that a name was last bound to."""
        scope: ast.AST | None = name
        while scope is not None:
            scope = self.parents.get(scope)
            if not isinstance(scope, Function | ast.Module):
                continue
            bound = self._bound(scope).get(name.id, [])
            inside = scope is not self.tree
            before = [b for b in bound if b[0].end_lineno < name.lineno or not inside]
            if before:
                statement, value = before[-1]
                return value if self._is_sure(statement, name) else None
            positional, others = parameters_of(scope)
            if bound or name.id in (*positional, *others):
                return None
        return None

    def _is_sure(self, statement: ast.AST, use: ast.AST) -> bool:
        """Whether a statement has run wherever use does: its block is around use."""
        block = self.parents[statement]
        node: ast.AST | None = use
        while node is not None and node is not block:
            node = self.parents.get(node)
        return node is not None

    def _bound(self, scope: ast.AST) -> dict[str, list["Binding"]]:
        """Returns what each name of a scope is bound to, in the order of the text."""
        if scope not in self._bindings:
            found = self._bindings[scope] = {}
            left = [*ast.iter_child_nodes(scope)]
            while left:
                node = left.pop(0)
                for name, value in bound_by(node):
                    found.setdefault(name, []).append((node, value))
                if not isinstance(node, Function | ast.ClassDef):
                    left = [*ast.iter_child_nodes(node), *left]
        return self._bindings[scope]

    def _calls_of(self, made: ast.Call) -> list[ast.Call]:
        """Returns the calls of what another call returns."""
        parent = self.parents.get(made)
        if isinstance(parent, ast.Call) and parent.func is made:
            return [parent]
        if not isinstance(parent, ast.Assign):
            return []
        scope = self.enclosing(made, *get_args(Function), ast.Module)
        return [
            node
            for node in ast.walk(scope or self.tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and self.value(node.func) is made
        ]

    def _parameters(self) -> Iterator[tuple[str, Parameters]]:
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef):
                yield node.name, parameters_of(node)
            elif isinstance(node, ast.ClassDef):
                methods = {
                    f.name: f for f in node.body if isinstance(f, ast.FunctionDef)
                }
                for name, method in methods.items():
                    (_, *positional), others = parameters_of(method)
                    yield f"{node.name}.{name}", (positional, others)
                fields = [f for f in node.body if isinstance(f, ast.AnnAssign)]
                if "__init__" not in methods:  # a dataclass
                    yield node.name, ([ast.unparse(f.target) for f in fields], [])

    def _taken_by(
        self, call: ast.Call, modules: Mapping[str, "Module"]
    ) -> Parameters | None:
        """Returns the names of the parameters of what is called, where it is ours."""
        function = call.func
        if isinstance(function, ast.Name):
            value = self.value(function)
            if isinstance(value, Function):
                return parameters_of(value)
            if function.id in self.parameters:  # a class
                return self.parameters[function.id]
            return parameters_in(modules, self.imported.get(function.id))
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            owner = function.value.id
            if owner == "self":
                around = self.enclosing(call, ast.ClassDef)
                name = f"{getattr(around, 'name', '')}.{function.attr}"
                return self.parameters.get(name)
            module, name = self.imported.get(owner, ("", None))
            inner = f"{module}.{name}" if name else module
            return parameters_in(modules, (inner, function.attr))
        return None


def parameters_in(
    modules: Mapping[str, Module], place: tuple[str, str | None] | None
) -> Parameters | None:
    """Returns the parameters of a name of a module, which may have imported it."""
    while place is not None and place[0] in modules and place[1]:
        module = modules[place[0]]
        if place[1] in module.parameters:
            return module.parameters[place[1]]
        place = module.imported.get(place[1])
    return None


def _imported(nodes: Sequence[ast.AST]) -> Iterator[tuple[str, tuple[str, str | None]]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name, (alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, (str(node.module), alias.name)


def parameters_of(function: ast.AST | None) -> Parameters:
    """Returns the names of a function's parameters: by position, and by name only."""
    if not isinstance(function, Function):
        return [], []
    taken = function.args
    positional = [arg.arg for arg in (*taken.posonlyargs, *taken.args)]
    return positional, [arg.arg for arg in taken.kwonlyargs]


def bound_by(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """Yields the names that a statement binds, each with its value where it is one."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name, node
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.For | ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
        targets = [node.target]
    for target in targets:
        if isinstance(target, ast.Name):
            yield target.id, node.value if isinstance(node, ast.Assign) else None
        else:
            inner = (one for one in ast.walk(target) if isinstance(one, ast.Name))
            yield from ((one.id, None) for one in inner)


def returns(function: Function) -> list[ast.expr]:
    """Returns the expressions that a function returns, not those of inner ones."""
    if isinstance(function, ast.Lambda):
        return [function.body]
    found: list[ast.expr] = []
    left: list[ast.AST] = [*function.body]
    while left:
        node = left.pop()
        if isinstance(node, ast.Return) and node.value is not None:
            found.append(node.value)
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            left += ast.iter_child_nodes(node)
    return found


def called(call: ast.Call) -> str:
    """Returns the last part of the name of what is called."""
    function = call.func
    return (
        function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
    )


def is_compared_elsewhere(value: ast.expr) -> bool:
    """Whether the result of a call is compared where its letters are written."""
    return isinstance(value, ast.Call) and called(value) in CONTRACTIONS | PLACEMENTS


def indexed(shape: str, index: ast.expr) -> str | None:
    """Returns the dims of x[index]; None where that is not known from the text."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    texts = [ast.unparse(part) for part in parts]
    taken = sum(text not in ("None", "...") for text in texts)
    dims, at = "", 0
    for part, text in zip(parts, texts, strict=True):
        if text == "None":
            dims += "1"
        elif text == "...":
            dims += shape[at : (at := len(shape) - (taken - at))]
        elif isinstance(part, ast.Slice):
            dims, at = dims + shape[at : at + 1], at + 1
        elif isinstance(part, ast.Constant) or text.startswith("-"):
            at += 1
        else:
            return None
    return dims + shape[at:] or None

"""Small changes of a module's syntax tree, each of which tests should notice."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
}
# types, decorators and the words of messages are not behaviour that a test should pin
SKIPPED = {"annotation", "returns", "decorator_list", "type_params"}
# a check of the program itself, as an assertion is; and what a system of today does without it
UNSEEN = {"strict", "encoding"}
Put = Callable[[Any], None]
Site = tuple[str, ast.AST, Any, Put, str, bool, ast.AST]
"""Kind, node, what replaces it, how, function, whether in one, and the node above."""


@dataclass(frozen=True)
class Mutant:
    """A module with one change, the `number`th that the module has."""

    module: str
    path: str
    number: int
    kind: str
    function: str
    in_function: bool
    line: int
    last_line: int
    change: str

    def __str__(self) -> str:
        return f"{self.module} {self.function}: {self.change}"


def mutants_of(module: str, path: str) -> list[Mutant]:
    """Every change that the operators make of a module."""
    return [
        Mutant(
            module,
            path,
            number,
            kind,
            function,
            inside,
            node.lineno,  # type: ignore[attr-defined]
            node.end_lineno or 0,  # type: ignore[attr-defined]
            _told(node, after, put, parent),
        )
        for number, site in enumerate(_parsed(path)[1])
        for kind, node, after, put, function, inside, parent in [site]
    ]


def compiled(mutant: Mutant) -> CodeType:
    """The module's code with the change."""
    tree, sites = _parsed(mutant.path)
    _, _, after, put, *_ = sites[mutant.number]
    put(after)
    return compile(ast.fix_missing_locations(tree), mutant.path, "exec")


def _parsed(path: str) -> tuple[ast.Module, list[Site]]:
    tree = ast.parse(Path(path).read_text())
    return tree, list(_sites(tree, "module", False))


def _told(node: ast.AST, after: ast.AST, put: Put, parent: ast.AST) -> str:
    """The change in words: of what is around a constant, too, for `0 -> 1` says nothing."""
    if isinstance(node, ast.stmt) or isinstance(parent, ast.stmt):
        return f"{_words(node)} -> {_words(after)}"
    before = _words(parent)
    put(after)
    told = f"{before} -> {_words(parent)}"
    put(node)
    return told


def _words(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:160]


def _sites(parent: ast.AST, function: str, inside: bool) -> Iterator[Site]:
    within_function = inside
    for name, value in ast.iter_fields(parent):
        inside = within_function
        if name in SKIPPED:
            continue
        if name == "args" and isinstance(parent, ast.FunctionDef):
            inside = False  # defaults are made where the function is
        for node, put in _children(parent, name, value):
            if isinstance(node, ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
                continue
            for kind, after in _changes(node):
                yield kind, node, after, put, function, inside, parent
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            within = node.name if named else function  # type: ignore[attr-defined]
            if named and function != "module":
                within = f"{function}.{within}"
            yield from _sites(node, within, inside or isinstance(node, ast.FunctionDef))


def _children(parent: ast.AST, name: str, value: object) -> Iterator[tuple[ast.AST, Put]]:
    if isinstance(value, ast.AST):
        yield value, lambda after: setattr(parent, name, after)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, ast.AST):

                def put(after: Any, index: int = index) -> None:
                    value[index] = after

                yield item, put


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.stmt():
            yield from _statements(node)
        case ast.Call():
            for index, keyword in enumerate(node.keywords):
                if keyword.arg and keyword.arg not in UNSEEN:
                    kept = [*node.keywords[:index], *node.keywords[index + 1 :]]
                    yield "keyword", ast.Call(node.func, node.args, kept)
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "constant", ast.Constant(value + 1)
        case _:
            yield from _operations(node)


def _operations(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.Compare(ops=[op, *rest]):
            ops = [COMPARISONS[type(op)](), *rest]
            yield "compare", ast.Compare(node.left, ops, node.comparators)
        case ast.BoolOp(op=ast.Or()):
            yield "bool", ast.BoolOp(ast.And(), node.values)
        case ast.BoolOp():
            yield "bool", ast.BoolOp(ast.Or(), node.values)
        case ast.UnaryOp(op=ast.Not()):
            yield "not", node.operand
        case ast.BinOp() if type(node.op) in ARITHMETIC and not _is_text(node):
            yield "arithmetic", ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)


def _statements(node: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.If() if _words(node.test) != "TYPE_CHECKING":
            yield "never", ast.If(ast.Constant(False), node.body, node.orelse)
        case ast.Return(value=value) if value is not None and _words(value) != "None":
            yield "return", ast.Return(ast.Constant(None))
        case ast.Raise() | ast.AugAssign() | ast.Delete() | ast.Continue() | ast.Break():
            yield "drop", ast.Pass()
        case ast.Expr(value=ast.Call() | ast.YieldFrom()):
            yield "drop", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "drop", ast.Pass()


def _is_text(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str | bytes))
        for side in sides
    )

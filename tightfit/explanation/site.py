"""Where in a script a step is taken: files, lines, and the names that its code has for things."""

from __future__ import annotations

import ast
import linecache
import sys
import textwrap
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tightfit.step.batch import batch_tensors

#: Trainers that have an integration, by the package that their class is of.
_HOSTS = {"transformers": "transformers", "lightning": "lightning", "pytorch_lightning": "lightning"}
_MOST_ITEMS = 64


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in the script's code. It holds no frame, whose variables would live on."""

    file: str
    line: int
    function: int
    """Identifies the code object."""
    names: Mapping[int, str] = field(repr=False)
    """The names of modules and optimizers, by the object's id."""
    tensors: Mapping[int, tuple[weakref.ref[torch.Tensor], str]] = field(repr=False)
    """The names of tensors, which may be gone, by the object's id."""
    host: str
    """Whose trainer takes the step, as `Script.host`."""


def script_frame() -> FrameType | None:
    """Return the innermost frame whose code is neither PyTorch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in ("torch", "tightfit"):
        frame = frame.f_back
    return frame


def current_site() -> Site | None:
    """Return the place of that frame."""
    frame = script_frame()
    if frame is None:
        return None
    names: dict[int, str] = {}
    tensors: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
    for name, value in (*frame.f_locals.items(), *frame.f_globals.items()):
        for thing, called in _named(name, value):
            if isinstance(thing, torch.Tensor):
                tensors.setdefault(id(thing), (weakref.ref(thing), called))
            else:
                names.setdefault(id(thing), called)
    return Site(
        file=frame.f_code.co_filename,
        line=frame.f_lineno,
        function=id(frame.f_code),
        names=names,
        tensors=tensors,
        host=_host_of(frame),
    )


def _named(name: str, value: Any) -> Iterator[tuple[Any, str]]:
    kind = type(value)
    if issubclass(kind, torch.Tensor | torch.nn.Module | torch.optim.Optimizer):
        yield value, name
    elif kind in (dict, list, tuple) and len(value) <= _MOST_ITEMS:
        for tensor in batch_tensors(value):
            yield tensor, name
    if name == "self":
        for attribute, inner in (getattr(value, "__dict__", None) or {}).items():
            if issubclass(type(inner), torch.nn.Module | torch.optim.Optimizer):
                yield inner, f"self.{attribute}"
        if isinstance(value, torch.nn.Module):
            for attribute, inner in value.named_children():
                yield inner, f"self.{attribute}"


def _host_of(frame: FrameType | None) -> str:
    while frame is not None:
        caller = frame.f_locals.get("self")
        for kind in type(caller).__mro__:
            package = kind.__module__.partition(".")[0]
            if kind.__name__ == "Trainer" and package in _HOSTS:
                return _HOSTS[package]
        frame = frame.f_back
    return ""


@dataclass(frozen=True, kw_only=True)
class LossSource:
    """The statements of a script from its model's call to its loss."""

    statements: tuple[ast.stmt, ...]
    result: ast.expr
    """What backward begins with, or what the function returns."""
    lines: tuple[str, ...]
    """The statements as they are written."""
    used_elsewhere: tuple[str, ...]
    """What they give a value to, beside the result, and other code reads, or they themselves the next time."""

    def names_read(self) -> list[str]:
        """Return the names that the statements read before they give them a value, if they do, as they come."""
        return names_read_first((*self.statements, self.result))

    def names_let_go(self) -> tuple[str, ...]:
        """Return what the statements always give a value to and nothing else reads: a function's variables."""
        given = [name for one in self.statements if isinstance(one, ast.Assign) for name in names_of(one, ast.Store)]
        still_read = {*self.used_elsewhere, *names_of(self.result, ast.Load)}
        return tuple(name for name in dict.fromkeys(given) if name not in still_read)


def loss_source(call: Site, backward: Site | None) -> LossSource | None:
    """Return the statements from the model's call up to backward's; None where they are not found.

    Without the place of `backward`, that is the next statement which calls something of that name, or returns.
    """
    if backward is not None and (call.file, call.function) != (backward.file, backward.function):
        return None
    source = linecache.getlines(call.file)
    try:
        tree = ast.parse("".join(source))
    except (SyntaxError, ValueError):
        return None
    for statements in _blocks(tree):
        first = _covering(statements, call.line)
        if first is None:
            continue
        last = _covering(statements, backward.line) if backward is not None else _end_after(statements, first)
        if last is None or last < first:
            continue
        body, end = statements[first:last], statements[last]
        result = end.value if isinstance(end, ast.Return) else _result_of(body, end)
        if result is None:
            return None
        kept = _leading_to(result, body)
        lines = "".join("".join(source[one.lineno - 1 : one.end_lineno]) for one in kept)
        return LossSource(
            statements=tuple(kept),
            result=result,
            lines=tuple(textwrap.dedent(lines).rstrip().splitlines()),
            used_elsewhere=_used_elsewhere(tree, kept, result),
        )
    return None


def _used_elsewhere(tree: ast.AST, kept: list[ast.stmt], result: ast.expr) -> tuple[str, ...]:
    made = dict.fromkeys(name for one in kept for name in names_of(one, ast.Store))
    read = set(names_read_first(kept)) | _read_outside(tree, {id(one) for one in kept})
    return tuple(name for name in made if name in read and name not in names_of(result, ast.Load))


def _read_outside(code: ast.AST, kept: set[int]) -> set[str]:
    """Return what code reads outside the kept statements, without the variables of functions that hold none of them."""
    if id(code) in kept:
        return set()
    found = {code.id} if isinstance(code, ast.Name) and isinstance(code.ctx, ast.Load) else set()
    for child in ast.iter_child_nodes(code):
        found |= _read_outside(child, kept)
    if isinstance(code, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        inside = list(ast.walk(code))
        if not any(id(one) in kept for one in inside):
            found -= {one.arg for one in inside if isinstance(one, ast.arg)} | set(names_of(code, ast.Store))
    return found


def _end_after(statements: list[ast.stmt], first: int) -> int | None:
    """Return the place of the statement that calls backward, or returns."""
    for place in range(first, len(statements)):
        one = statements[place]
        calls = [node.func for node in ast.walk(one) if isinstance(node, ast.Call)]
        names = {func.attr for func in calls if isinstance(func, ast.Attribute)}
        if isinstance(one, ast.Return) or (place > first and names & {"backward", "manual_backward"}):
            return place
    return None


def _result_of(body: list[ast.stmt], end: ast.stmt) -> ast.expr | None:
    """Return the name in backward's statement that the body has given a value."""
    assigned = {name for statement in body for name in names_of(statement, ast.Store)}
    found = next((name for name in names_of(end, ast.Load) if name in assigned), None)
    return None if found is None else ast.Name(id=found, ctx=ast.Load())


def _leading_to(result: ast.expr, body: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements that an expression's value comes from."""
    needed = set(names_of(result, ast.Load))
    kept: list[ast.stmt] = []
    for statement in reversed(body):
        if needed.intersection(names_of(statement, ast.Store)):
            kept.append(statement)
            needed.update(names_of(statement, ast.Load))
    return kept[::-1]


def names_of(code: ast.AST, context: type[ast.expr_context]) -> list[str]:
    """Return the names that code reads or gives a value to."""
    return [node.id for node in ast.walk(code) if isinstance(node, ast.Name) and isinstance(node.ctx, context)]


def names_read_first(code: Iterable[ast.AST]) -> list[str]:
    """Return the names that code reads before it has given them a value, in the order in which it is run."""
    reader = _Reader()
    for one in code:
        reader.visit(one)
    return list(reader.read_first)


class _Reader(ast.NodeVisitor):
    """Goes through code in the order in which it is run; of two branches, both."""

    def __init__(self) -> None:
        self.read_first: dict[str, None] = {}
        self._given: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._given.add(node.id)
        elif node.id not in self._given:
            self.read_first[node.id] = None

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.visit(ast.Name(id=node.target.id, ctx=ast.Load()))
        self._visit_in_order(node.value, node.target)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._visit_in_order(node.value, *node.targets)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._visit_in_order(node.value, node.target)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._visit_in_order(node.value, node.target)

    def visit_For(self, node: ast.For) -> None:
        self._visit_in_order(node.iter, node.target, *node.body, *node.orelse)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._visit_in_order(node.iter, node.target, *node.ifs)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        arguments = {one.arg for one in ast.walk(node.args) if isinstance(one, ast.arg)}
        self._visit_inside(node.args, node.body, given=arguments)

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
            self._visit_inside(*node.generators, node.elt)
        elif isinstance(node, ast.DictComp):
            self._visit_inside(*node.generators, node.key, node.value)
        else:
            super().generic_visit(node)

    def _visit_inside(self, *nodes: ast.AST, given: Iterable[str] = ()) -> None:
        """Go through code whose variables are its own."""
        before = set(self._given)
        self._given.update(given)
        self._visit_in_order(*nodes)
        self._given = before

    def _visit_in_order(self, *nodes: ast.AST | None) -> None:
        for one in nodes:
            if one is not None:
                self.visit(one)


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield each list of statements, the innermost first."""
    blocks = [
        block
        for node in ast.walk(tree)
        for name in ("body", "orelse", "finalbody")
        if isinstance(block := getattr(node, name, None), list) and block and isinstance(block[0], ast.stmt)
    ]
    yield from reversed(blocks)


def _covering(statements: list[ast.stmt], line: int) -> int | None:
    for place, statement in enumerate(statements):
        if statement.lineno <= line <= (statement.end_lineno or statement.lineno):
            return place
    return None


def place_of(call: Site, lines: int) -> str:
    """Return where the lines are, for people."""
    name = Path(call.file).name
    return f"{name}, line {call.line}" if lines < 2 else f"{name}, from line {call.line} on"

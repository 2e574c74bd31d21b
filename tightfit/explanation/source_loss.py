"""The loss of a script whose memory ran out before it had one: its own lines, run again as a function."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch

from tightfit.explanation.site import Site, loss_source, names_read_first
from tightfit.step.batch import batch_tensors

_FUNCTION = "loss_of_the_script"


class SourceLoss:
    """The lines from the model's call to the loss, as a function of model and batch; as `tightfit.Step` takes it.

    Args:
        function: takes the modules, the batch and what else the lines read, by name.
        modules: by the name in the lines: the module.
        batch: by the name in the lines: tensors, or containers of them.
        constants: by the name in the lines: everything else that is local.
    """

    def __init__(
        self,
        function: Any,
        modules: Mapping[str, torch.nn.Module],
        batch: Mapping[str, Any],
        constants: Mapping[str, Any],
    ) -> None:
        self._function = function
        self.modules = dict(modules)
        """By the name in the lines: the module."""
        self._paths: dict[str, str] = {}
        self._names = tuple(batch)
        self._constants = dict(constants)
        self.batch = tuple(batch.values())
        """What comes from outside the model."""
        self.batch_names = list(batch)
        """What the script calls these."""

    def use_paths(self, path_of: Callable[[torch.nn.Module], str | None]) -> None:
        """Find each of `modules` in the model that the loss is called with; what is not there is as it is."""
        for name, module in self.modules.items():
            path = path_of(module)
            if path is None:
                self._constants[name] = module
            else:
                self._paths[name] = path

    def __call__(self, model: torch.nn.Module, batch: tuple[Any, ...]) -> Any:
        """Run the lines, and return the loss."""
        modules = {name: model.get_submodule(path) for name, path in self._paths.items()}
        return self._function(**modules, **dict(zip(self._names, batch, strict=True)), **self._constants)


def source_loss(frame: FrameType | None, call: Site | None) -> SourceLoss | None:
    """Return the loss of the lines from a call on; None where they are not found, or call nothing of the kind.

    Args:
        frame: in which the model is being called.
        call: the place of that call.
    """
    source = None if call is None else loss_source(call, None)
    if source is None or frame is None:
        return None
    variables = {**frame.f_globals, **frame.f_locals}
    finder = _ModuleFinder(variables)
    body: list[ast.stmt] = [finder.visit(copy.deepcopy(statement)) for statement in source.statements]
    body.append(ast.Return(value=finder.visit(copy.deepcopy(source.result))))
    read = variables.keys() & set(names_read_first(body))
    batch: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for name in sorted(read - finder.modules.keys()):
        value = variables[name]
        if isinstance(value, torch.Tensor) or (isinstance(value, dict | list | tuple) and batch_tensors(value)):
            batch[name] = value
        elif name in frame.f_locals and frame.f_locals is not frame.f_globals:
            constants[name] = value
    parameters = [*finder.modules, *batch, *constants]
    tree = ast.parse(f"def {_FUNCTION}({', '.join(parameters)}): ...")
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.body = body
    ast.fix_missing_locations(tree)
    made: dict[str, Any] = {}
    exec(compile(tree, call.file if call is not None else "", "exec"), frame.f_globals, made)
    return SourceLoss(made[_FUNCTION], finder.modules, batch, constants)


class _ModuleFinder(ast.NodeTransformer):
    """Replaces names and attributes that stand for modules with parameters by names of their own."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._variables = variables
        self.modules: dict[str, torch.nn.Module] = {}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._replaced(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        found = self._replaced(node)
        return found if found is not node else ast.NodeTransformer.generic_visit(self, node)  # type: ignore[return-value]  # of the same kind

    def _replaced(self, node: ast.Name | ast.Attribute) -> ast.expr:
        value = self._value_of(node)
        if not isinstance(node.ctx, ast.Load) or not isinstance(value, torch.nn.Module):
            return node
        if next(value.parameters(), None) is None:
            return node
        name = "_".join(["module", *ast.unparse(node).split(".")])
        self.modules[name] = value
        return ast.copy_location(ast.Name(id=name, ctx=ast.Load()), node)

    def _value_of(self, node: ast.expr) -> Any:
        """Return the value of a name or of attributes of one, as far as looking them up runs no code."""
        if isinstance(node, ast.Name):
            return self._variables.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = self._value_of(node.value)
        if isinstance(owner, torch.nn.Module):
            return dict(owner.named_children()).get(node.attr)
        return (getattr(owner, "__dict__", None) or {}).get(node.attr)

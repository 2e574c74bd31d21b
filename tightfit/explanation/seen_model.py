"""The model of a step that was seen: one module around all that were called."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

import torch

from tightfit._torch_private.modules import inside_compiled
from tightfit.explanation.breakdown import LOSS, MODEL
from tightfit.explanation.recorder import Owner


class SeenModel:
    """One module around the outermost modules of a step, and the paths of all modules in it.

    Args:
        called: the outermost modules.
        names: what the script calls them, by id.
    """

    def __init__(self, called: Sequence[torch.nn.Module], names: Mapping[int, str]) -> None:
        inner = [unwrapped(module) for module in called]
        self.module = _around(inner, names)
        self.is_made = len(inner) > 1 and isinstance(self.module, SeveralModels)
        """No module of the script's is around all that were called."""
        self._paths: dict[int, str] = {id(module): path for path, module in self.module.named_modules()}
        for outer, one in zip(called, inner, strict=True):
            self._paths[id(outer)] = self._paths[id(one)]

    def path_of(self, module: torch.nn.Module) -> str:
        """Return the path of a module in `module`."""
        return self._paths[id(module)]

    def path_if_inside(self, module: torch.nn.Module) -> str | None:
        """Return the path of a module that may be in `module`; None if it is not."""
        return self._paths.get(id(module))

    def name_of(self, owner: Owner) -> str:
        """Return an owner's name in a breakdown; a module that is not in it is outside the model."""
        if isinstance(owner, str):
            return owner
        path = self._paths.get(id(owner))
        return LOSS if path is None else path or MODEL


class SeveralModels(torch.nn.Module):
    """Modules that one step trains together."""

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside `torch.compile`'s wrapper and those that join processes."""
    while True:
        inner = inside_compiled(module)
        if inner is None and isinstance(module, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            inner = module.module
        if not isinstance(inner, torch.nn.Module):
            return module
        module = inner


def _around(called: Sequence[torch.nn.Module], names: Mapping[int, str]) -> torch.nn.Module:
    if len(called) == 1:
        return called[0]
    sizes = [(len(found), module) for module in _all_modules() if (found := _inside(module)) >= {id(m) for m in called}]
    if sizes:
        return min(sizes, key=lambda entry: entry[0])[1]
    several: dict[str, torch.nn.Module] = {}
    for module in called:
        name = names.get(id(module), type(module).__name__).rpartition(".")[2]
        several[name if name not in several else f"{name}{len(several)}"] = module
    return SeveralModels(several)


def _all_modules() -> list[torch.nn.Module]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Module)]


def _inside(module: torch.nn.Module) -> set[int]:
    return {id(one) for one in module.modules()}

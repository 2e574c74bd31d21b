"""Put the forwards of a plan's regions on a model's modules, and take them off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from tightfit._torch_private.modules import own_children
from tightfit.distributed._fsdp_private import wrap_fsdp_hooks
from tightfit.errors import PlanMismatch
from tightfit.installation.region_forward import RegionForward
from tightfit.operators.escaped_memory import with_fast_paths
from tightfit.operators.region_names import LOSS, ROOT
from tightfit.replay.installed import Installed
from tightfit.step.models import name_of


class ModelForwards:
    """The forwards that are installed on a model now."""

    def __init__(self, model: torch.nn.Module, installed: Installed) -> None:
        self._model = model
        self._installed = installed
        self._modules: list[torch.nn.Module] = []
        self._forwards: list[RegionForward] = []
        self._paths: list[str] = []
        self._links: list[tuple[Mapping[str, torch.nn.Module | None], str, torch.nn.Module | None]] = []
        """From the model down to those modules: a module's children, and one of them by its name."""
        self._leave_machinery: Callable[[], None] | None = None
        """Removes the hooks that hide FSDP2's own operations from the tape."""

    @property
    def are_on(self) -> bool:
        """Whether any is installed."""
        return bool(self._modules)

    def put_on(self, paths: Sequence[str], make_root: Callable[[torch.nn.Module], RegionForward]) -> None:
        """Have forwards on the modules at these paths, and on no others; `make_root` makes that of the model itself.

        Raises:
            PlanMismatch: the model has no module at one of them.
        """
        if paths == self._paths and all(children.get(name) is child for children, name, child in self._links):
            return
        wanted = [module_at(self._model, path) for path in paths]
        if len(wanted) == len(self._modules) and all(a is b for a, b in zip(wanted, self._modules, strict=True)):
            return
        self.take_off()
        for path, module in zip(paths, wanted, strict=True):
            forward = make_root(module) if path == ROOT else RegionForward(module, path, self._installed)
            module.__dict__["forward"] = forward
            self._modules.append(module)
            self._forwards.append(forward)
        self._installed.fast_paths = with_fast_paths(self._model)
        if wanted:
            self._leave_machinery = wrap_fsdp_hooks(self._model, self._installed.aside)
        self._paths, self._links = list(paths), _links(self._model, paths)

    def take_off(self) -> None:
        """Leave each module's forward as it was; what others have wrapped around it stays."""
        for installed in self._forwards:
            installed.is_attached = False
        self._forwards, self._paths, self._links = [], [], []
        for module in self._modules:
            forward = vars(module).get("forward")
            if isinstance(forward, RegionForward):
                if forward.had_own:
                    module.__dict__["forward"] = forward.original
                else:
                    del module.__dict__["forward"]
        self._modules = []
        if self._leave_machinery is not None:
            self._leave_machinery()
            self._leave_machinery = None

    @contextmanager
    def returning(self, results: Mapping[str, Sequence[Any]]) -> Iterator[None]:
        """Open a context in which each call of a module returns the next of its results, by its path."""
        forwards = [vars(module_at(self._model, path))["forward"] for path in results]
        originals = [forward.original for forward in forwards]
        for forward, returned in zip(forwards, results.values(), strict=True):
            forward.original = partial(_next_of, iter(returned))
        try:
            yield
        finally:
            for forward, original in zip(forwards, originals, strict=True):
                forward.original = original


def _links(
    model: torch.nn.Module, paths: Sequence[str]
) -> list[tuple[Mapping[str, torch.nn.Module | None], str, torch.nn.Module | None]]:
    """Return the links that lead from a model to its modules at these paths; each once."""
    found: dict[str, tuple[Mapping[str, torch.nn.Module | None], str, torch.nn.Module | None]] = {}
    for path in paths:
        module, walked = model, ""
        for name in path.split(".") if path != ROOT else ():
            walked += f".{name}"
            children = own_children(module)
            module = module.get_submodule(name)
            found.setdefault(walked, (children, name, module))
    return list(found.values())


def module_at(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """Return the module of a region's path.

    Raises:
        PlanMismatch: there is none.
    """
    try:
        return model.get_submodule("" if path == ROOT else path)
    except AttributeError:
        raise PlanMismatch(
            f"the plan has a region {path!r}, but {name_of(model)} has no module of that name. "
            "The plan is of another model. Measure and solve for this one."
        ) from None


def paths_around(model: torch.nn.Module, excluded: Sequence[str]) -> frozenset[str]:
    """Return the paths of all modules around the excluded ones, and the loss, which may call any."""
    if not excluded:
        return frozenset()
    inner = {module_at(model, path) for path in excluded}
    modules = model.named_modules(remove_duplicate=False)
    around = {path or ROOT for path, module in modules if not inner.isdisjoint(module.modules())}
    return frozenset({*around, LOSS})


def _next_of(results: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
    return next(results)

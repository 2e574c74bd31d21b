"""Compare calls of regions, plain and replayed, from identical inputs.

For when the plain step does not fit the budget: one region's plain backward does.  And for when the plain step is not
reproducible: from the same inputs, most of its regions are; what a region does not reproduce either is compared with
PyTorch's deterministic kernels.  Inputs are taken from a real planned step; output gradients are made up, the same for
all runs.

One call of each module is compared for each recipe that it follows, and the loss function on what the model returned.
Segments cannot be called on their own; those of a recipe that no compared call follows are listed as unverified.  So
is all that a backward inside the loss function reads (``create_graph=True``): no call of a part has such a backward.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tightfit._torch_private.dispatch import tree_leaves, tree_map
from tightfit._torch_private.tensors import version_of
from tightfit.device import device_for
from tightfit.device.process_state import deterministic_libraries
from tightfit.distributed.fsdp import can_be_called_alone, ensure_sharded, forget_iteration, gathered, sharded_modules
from tightfit.distributed.process_group import CommunicationFailed
from tightfit.installation.applied import Applied
from tightfit.installation.region_forward import RegionForward
from tightfit.interrupts import pass_on
from tightfit.operators.region_names import LOSS, ROOT, is_begun_by_backward
from tightfit.progress import progress
from tightfit.step.host_copy import CopyFile, HostCopy
from tightfit.step.models import paths_of_models
from tightfit.step.results import Keep, Results, results_of
from tightfit.step.snapshot import RandomState
from tightfit.verification.argument_copies import is_written_into, with_parts_replaced
from tightfit.verification.comparison import Comparison, paths_called_again
from tightfit.verification.marks import keeper
from tightfit.verification.trial import Trial

#: Keys of the model's own call, and of the loss function's.
_WHOLE, _LOSS = f"{ROOT}#0", f"{LOSS}#0"


@dataclass(frozen=True, kw_only=True)
class _OnHost:
    """A tensor argument, kept outside the device's memory."""

    contents: HostCopy
    device: torch.device
    requires_grad: bool


@dataclass(frozen=True)
class _Holding:
    """An object that may hold tensors, as it was before the call: a copy with `_OnHost` in their places."""

    thing: Any


@dataclass(frozen=True)
class _Call:
    """A call of a region's module, or of the loss function, that can be made again."""

    key: str
    module: torch.nn.Module
    """What it may change, and the parameters that it uses."""
    run: Callable[..., Any]
    arguments: Any
    random_state: RandomState
    autocast: torch.dtype | None
    """What was open around the call, which the loss function may have opened."""


@dataclass(frozen=True)
class _Setting:
    """What all calls that are compared have in common."""

    applied: Applied
    trial: Trial
    units: Sequence[Any]
    """Modules of the model that are sharded."""
    called_again: frozenset[str]


def compare_regions(trial: Trial, applied: Applied, *, whole: bool) -> Comparison:
    """Compare calls of the planned regions, from inputs of a planned step of the trial.

    If `whole`, the model's own call comes first, which takes the plain step's memory; the others only if that gives no
    answer.  The processes that share a sharded model make the same calls together, each with its own inputs.
    """
    model, group = trial.model, trial.group
    found = Comparison()
    recipe_of = {region.key: region.recipe for region in applied.plan.regions if region.recipe >= 0}
    wanted = _to_compare(recipe_of) | ({_WHOLE} if whole else set())
    calls: dict[str, _Call] = {}
    trial.run_planned(applied, inside=_capturing(trial, applied, wanted, calls))
    everyones = group.all_gather(sorted(calls))
    keys = [key for key in sorted(calls) if all(key in one for one in everyones)]
    ensure_sharded(model)
    trial.go_to_start()
    was_compared: dict[str, bool] = {}
    setting = _Setting(applied, trial, sharded_modules(model), paths_called_again(applied.plan))
    if _WHOLE in keys:
        keys.remove(_WHOLE)
        was_compared[_WHOLE] = _compare(calls[_WHOLE], setting, found)
    if was_compared.get(_WHOLE):
        keys = [key for key in keys if key == _LOSS]
    for number, key in enumerate(keys):
        progress("comparing regions", number, len(keys))
        was_compared[key] = _compare(calls[key], setting, found)
    trial.go_to_start()
    by_recipe: dict[int, str] = {}
    covered = {recipe_of[key] for key, was in was_compared.items() if was and key in recipe_of}
    # A call that is made alone runs no backward inside the forward around it, nor what that saves.
    inside = [region.key for region in applied.plan.regions if is_begun_by_backward(region.key)]
    inside_loss = any(key.startswith(LOSS) for key in inside)
    for key, recipe in recipe_of.items():
        unit = _LOSS if key.startswith(LOSS) else _WHOLE
        was = was_compared.get(unit) or (recipe in covered and not inside)
        if inside_loss or not was:
            by_recipe.setdefault(recipe, key)
    failed = [key for key in keys if not was_compared[key]]
    found.unverified += dict.fromkeys((*by_recipe.values(), *failed))
    return found


def _to_compare(recipe_of: Mapping[str, int]) -> set[str]:
    """Return the keys of the first call of each module for each recipe that it follows, and of the loss."""
    first: dict[tuple[str, int], str] = {}
    for key, recipe in recipe_of.items():
        if key.startswith(LOSS):
            first[LOSS, -1] = _LOSS
        elif "/" not in key and not key.startswith(ROOT):
            first.setdefault((_path_of(key), recipe), key)
    return set(first.values())


def _path_of(key: str) -> str:
    return key.rpartition("#")[0]


@contextmanager
def _capturing(trial: Trial, applied: Applied, wanted: AbstractSet[str], calls: dict[str, _Call]) -> Iterator[None]:
    """Note the inputs of the wanted calls, outside the device's memory; not of modules with regions inside."""
    model = trial.model
    counts: dict[str, int] = {}
    handles = []
    file = CopyFile()
    copied: dict[int, tuple[weakref.ref[torch.Tensor], int, HostCopy]] = {}

    def copy_of(tensor: torch.Tensor) -> HostCopy:
        """Copy a tensor that goes to many regions (a mask) once."""
        version = -1 if tensor.is_inference() else version_of(tensor)
        known = copied.get(id(tensor))
        if known is None or known[0]() is not tensor or known[1] != version:
            known = copied[id(tensor)] = weakref.ref(tensor), version, HostCopy(tensor, file)
        return known[2]

    def save(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return _OnHost(contents=copy_of(leaf), device=leaf.device, requires_grad=leaf.requires_grad)
        if is_written_into(leaf):  # also what this call leaves there, and with the graph that it came from
            return _Holding(with_parts_replaced(leaf, torch.Tensor, save))
        return leaf

    paths = {_path_of(key) for key in wanted}
    results: dict[str, list[Any]] = {}
    open_models: list[str] = []

    def note(key: str, module: torch.nn.Module, call: Callable[..., Any], arguments: Any) -> None:
        random_state = RandomState()
        autocast = device_for(trial.device).ambient_autocast()
        calls[key] = _Call(key, module, call, tree_map(save, arguments), random_state, autocast)

    def watch(path: str, module: torch.nn.Module) -> None:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if not torch.is_grad_enabled():
                return
            key = f"{path}#{counts.get(path, 0)}"
            counts[path] = counts.get(path, 0) + 1
            if key in wanted and (key == _WHOLE or _is_leaf_region(module)):
                note(key, module, module, (args, kwargs))

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def watch_results(path: str, module: torch.nn.Module) -> None:
        def begins(module: torch.nn.Module, args: Any) -> None:
            open_models.append(path)

        def ends(module: torch.nn.Module, args: Any, result: Any) -> None:
            open_models.pop()
            if not open_models:  # not inside another's call, which will not be made
                results.setdefault(path, []).append(tree_map(save, result))

        handles.append(module.register_forward_pre_hook(begins))
        handles.append(module.register_forward_hook(ends))

    for path, module in model.named_modules():
        if (path or ROOT) in paths:
            watch(path or ROOT, module)
    if _LOSS in wanted:
        for path in paths_of_models(model) or (ROOT,):
            module = model if path == ROOT else model.get_submodule(path)
            if isinstance(vars(module).get("forward"), RegionForward):  # else its calls are the loss's
                watch_results(path, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if results:
        of_one = {path: found[: len(found) // trial.step.accumulation_steps] for path, found in results.items()}
        note(_LOSS, model, partial(_run_loss, trial, applied), ((of_one,), {}))


def _run_loss(trial: Trial, applied: Applied, results: Mapping[str, Sequence[Any]]) -> torch.Tensor:
    """Run the loss function on what calls of the model, or of several, returned."""
    with applied.returning(results):
        return trial.step.run_loss(trial.model, trial.batch)


def _is_leaf_region(module: torch.nn.Module) -> bool:
    """Tell whether no other region is inside: then the call is one region, not segments around others."""
    return not any(
        isinstance(vars(below).get("forward"), RegionForward) for below in module.modules() if below is not module
    )


def _compare(call: _Call, setting: _Setting, found: Comparison) -> bool:
    """Compare one call; return whether what it returned could be.  Processes that share the model do so together."""
    applied, trial = setting.applied, setting.trial
    group = trial.group
    state = trial.snapshot_at_start(call.module, also=(trial.batch,) if call.key == _LOSS else ())

    def run(around: AbstractContextManager[None], copied: AbstractSet[str] | None = None) -> Results:
        try:
            inputs = _Inputs(call)  # before the region begins, which would take loading them for its own operations
            with around, gathered(setting.units, call.module):
                return _run(call, inputs, keeper(copied))
        finally:
            state.restore()

    def attempt(key: str) -> Comparison | None:
        here = Comparison(called_again=setting.called_again)
        path = "" if call.module is trial.model else _path_of(call.key)
        try:
            plain, again = run(applied.paused()), run(applied.paused())
            here.add(plain, again, run(applied.following(call.key)), key, path)
        except CommunicationFailed:
            raise
        except Exception as error:  # of whatever kind: not all that a step may call can be called alone
            pass_on(error)
            return None
        return here

    def measure(one: Comparison) -> None:
        if any(group.all_gather(bool(one.unmeasured))):
            copied = frozenset(one.unmeasured.values())
            one.measure(run(applied.paused(), copied), run(applied.following(call.key), copied))

    here = attempt(call.key) if can_be_called_alone(call.module) else None
    was_possible = all(group.all_gather(here is not None))
    if here is None or not was_possible:
        forget_iteration(trial.model)  # a backward that an error has ended is not over for FSDP2
        return False
    measure(here)
    best = here
    if any(group.all_gather(bool(here.not_reproducible))):
        with _deterministic_kernels():
            other = attempt(f"{call.key} with deterministic kernels")
            if all(group.all_gather(other is not None)) and other is not None:
                measure(other)
            else:
                forget_iteration(trial.model)
        if other is not None and len(other.not_reproducible) < len(here.not_reproducible):
            here.include(other)
            best = other
    found.include(here)
    # Gradients that are the same whatever a call returns (a last bias has the sum of the output's) tell nothing of it.
    is_answer = best.reproduces("output") and best.equal("gradient of", "output") is not None
    return all(group.all_gather(is_answer))


@contextmanager
def _deterministic_kernels() -> Iterator[None]:
    """Use deterministic kernels inside, where there are any."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with deterministic_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _Inputs:
    """A call's arguments, loaded again, and the tensors among them whose gradients are compared."""

    def __init__(self, call: _Call) -> None:
        self.with_gradients: list[torch.Tensor] = []
        self.args, self.kwargs = tree_map(self._load, call.arguments)

    def _load(self, leaf: Any) -> Any:
        if isinstance(leaf, _Holding):
            return with_parts_replaced(leaf.thing, _OnHost, self._load)
        if not isinstance(leaf, _OnHost):
            return leaf
        loaded = leaf.contents.load().to(leaf.device)
        loaded.requires_grad_(leaf.requires_grad)
        if not leaf.requires_grad:
            return loaded
        self.with_gradients.append(loaded)
        return loaded * 1  # as inside a model: an input that is not a leaf may be written in place


def _run(call: _Call, inputs: _Inputs, keep: Keep) -> Results:
    call.random_state.restore()
    module = call.module
    for parameter in module.parameters():
        parameter.grad = None
    with device_for(module).autocast(call.autocast) if call.autocast is not None else nullcontext():
        output = call.run(*inputs.args, **inputs.kwargs)
    found: dict[str, object] = {}
    outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
    for index, tensor in enumerate(outputs):
        found[f"output {index}"] = keep(f"output {index}", tensor)
    torch.autograd.backward(outputs, gradients)
    for index, tensor in enumerate(inputs.with_gradients):
        if tensor.grad is not None:
            found[f"gradient of input {index}"] = keep(f"gradient of input {index}", tensor.grad)
    return found | results_of(module, keep)

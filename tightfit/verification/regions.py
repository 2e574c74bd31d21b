"""Compare one call of each region class, plain and replayed, from identical inputs.

For when the plain step does not fit the budget: one region's plain backward does.  Inputs are taken from a real planned
step; output gradients are made up, the same for both runs.  Segments and `<loss>` cannot be called on their own and are
listed as unverified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tightfit._torch_private import tree_leaves, tree_map
from tightfit.installation.applied import Applied, RegionForward
from tightfit.step.host_copy import CopyFile, HostCopy, difference, same_contents
from tightfit.step.snapshot import RandomState, TrainingState


@dataclass(kw_only=True)
class RegionComparison:
    """What was found, over all region classes."""

    compared: int = 0
    differing: dict[str, float] = field(default_factory=dict)
    not_reproducible: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _OnHost:
    """A tensor argument, kept outside the device's memory."""

    contents: HostCopy
    device: torch.device
    requires_grad: bool


@dataclass(frozen=True, kw_only=True)
class _Call:
    module: torch.nn.Module
    arguments: Any
    random_state: RandomState


def compare_regions(
    model: torch.nn.Module, applied: Applied, run_step: Callable[[AbstractContextManager[None]], object]
) -> RegionComparison:
    """Compare the first call of each recipe.

    The inputs come from a planned step, which `run_step` takes inside the given context after it restored the model.
    """
    plan = applied.plan
    first_of_recipe: dict[int, str] = {}
    for region in plan.regions:
        if region.recipe >= 0:
            first_of_recipe.setdefault(region.recipe, region.key)
            if "/" in first_of_recipe[region.recipe] and "/" not in region.key:
                first_of_recipe[region.recipe] = region.key
    wanted = set(first_of_recipe.values())
    calls: dict[str, _Call] = {}
    run_step(_capturing(model, wanted, calls))
    result = RegionComparison()
    state = TrainingState(model, ())
    for key in sorted(wanted):
        call = calls.get(key)
        outcome = None if call is None else _compare(key, call, applied, state, result)
        if outcome is None:
            result.unverified.append(key)
        else:
            result.compared += 1
    state.restore()
    return result


@contextmanager
def _capturing(model: torch.nn.Module, wanted: set[str], calls: dict[str, _Call]) -> Iterator[None]:
    """Note the inputs of the wanted whole-module calls, outside the device's memory."""
    counts: dict[str, int] = {}
    handles = []
    file = CopyFile()

    def save(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return _OnHost(contents=HostCopy(leaf, file), device=leaf.device, requires_grad=leaf.requires_grad)

    paths = {key.rsplit("#", 1)[0] for key in wanted if "/" not in key and not key.startswith("<")}

    def watch(path: str, module: torch.nn.Module) -> None:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if not torch.is_grad_enabled():
                return
            key = f"{path}#{counts.get(path, 0)}"
            counts[path] = counts.get(path, 0) + 1
            if key in wanted and _is_leaf_region(module):
                arguments = tree_map(save, (args, kwargs))
                calls[key] = _Call(module=module, arguments=arguments, random_state=RandomState())

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    for path, module in model.named_modules():
        if path in paths:
            watch(path, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_leaf_region(module: torch.nn.Module) -> bool:
    """Tell whether no other region is inside: then the call is one region, not segments around others."""
    return not any(
        isinstance(vars(below).get("forward"), RegionForward) for below in module.modules() if below is not module
    )


def _compare(key: str, call: _Call, applied: Applied, state: TrainingState, result: RegionComparison) -> bool | None:
    try:
        plain = _run(call, applied, state, planned=False)
        again = _run(call, applied, state, planned=False)
        planned = _run(call, applied, state, planned=True)
    except (RuntimeError, TypeError):
        return None
    for name, contents in plain.items():
        if not same_contents(contents, again.get(name)):
            result.not_reproducible.append(f"{key}: {name}")
        elif not same_contents(contents, planned.get(name)):
            result.differing[f"{key}: {name}"] = difference(contents, planned.get(name))
    return True


def _run(call: _Call, applied: Applied, state: TrainingState, *, planned: bool) -> dict[str, HostCopy]:
    state.restore()
    call.random_state.restore()
    inputs: list[torch.Tensor] = []

    def back(leaf: Any) -> Any:
        if not isinstance(leaf, _OnHost):
            return leaf
        moved = leaf.contents.load().to(leaf.device)
        moved.requires_grad_(leaf.requires_grad)
        if not leaf.requires_grad:
            return moved
        inputs.append(moved)
        return moved * 1  # as inside a model: an input that is not a leaf may be written in place

    args, kwargs = tree_map(back, call.arguments)
    module = call.module
    for parameter in module.parameters():
        parameter.grad = None
    if planned:
        output = module(*args, **kwargs)
    else:
        with applied.paused():
            output = module(*args, **kwargs)
    file = CopyFile()
    found: dict[str, HostCopy] = {}
    outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
    for index, tensor in enumerate(outputs):
        found[f"output {index}"] = HostCopy(tensor, file)
    torch.autograd.backward(outputs, gradients)
    for index, tensor in enumerate(inputs):
        if tensor.grad is not None:
            found[f"gradient of input {index}"] = HostCopy(tensor.grad, file)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = HostCopy(parameter.grad, file)
    for name, buffer in module.named_buffers():
        found[f"buffer {name}"] = HostCopy(buffer, file)
    found["random state"] = HostCopy(torch.get_rng_state(), file)
    return found

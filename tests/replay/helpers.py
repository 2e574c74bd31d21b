"""Running the same computation plain and under the engine, and comparing every bit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tightfit.installation.region_forward import RegionForward
from tightfit.replay.contents import same_bits
from tightfit.replay.installed import Installed
from tightfit.replay.statistics import Statistics

PATH = "region"

Function = Callable[[torch.Tensor, torch.Tensor], Any]


@dataclass
class Run:
    """What one run left behind: tensors by name, or the error that it raised."""

    tensors: dict[str, torch.Tensor | None] = field(default_factory=dict)
    error: Exception | None = None
    statistics: Statistics | None = None


@contextmanager
def planned(model: nn.Module, *paths: str, recipes: Mapping[str, Any] | None = None) -> Iterator[Installed]:
    """The engine on the modules at `paths`, dropping all that is provably replayable (or what `recipes` say)."""
    installed = Installed(recipes=recipes or {})
    modules = [model.get_submodule(path) for path in paths]
    for path, module in zip(paths, modules, strict=True):
        module.__dict__["forward"] = RegionForward(module, path or "<model>", installed)
    try:
        yield installed
    finally:
        for module in modules:
            module.__dict__.pop("forward").is_attached = False


def total(result: Any) -> torch.Tensor:
    """A scalar that depends on every tensor of a result."""
    parts = result if isinstance(result, tuple | list) else (result,)
    return sum(((p.abs() if p.is_complex() else p).double() * 0.5).sum() for p in parts if isinstance(p, torch.Tensor))  # type: ignore[return-value]  # a sum of tensors is a tensor


def run(
    function: Function,
    *,
    replay: bool,
    after: Callable[[Any], torch.Tensor] = total,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    calls: int = 1,
    self_check: bool = True,
) -> Run:
    """`function(x, w)` in one region, then `after` outside it, then `backward`.  `calls` times; the last one counts."""
    found = Run()
    installed = Installed(recipes={}, self_check=self_check)
    for _ in range(calls):
        torch.manual_seed(1)
        w = torch.randn(16, 16).requires_grad_()
        leaf = torch.randn(8, 16).requires_grad_()
        x = leaf * 1.0
        installed.statistics.reset()
        try:
            if replay:
                with installed.region(PATH):
                    result = function(x, w)
            else:
                result = function(x, w)
            loss = after(result)
            found.tensors = {"loss": loss.detach().clone()}
            del result
            backward(loss)
        except RuntimeError as error:
            found.error = error
            return found
        found.tensors |= {"x.grad": leaf.grad, "w.grad": w.grad, "random state": torch.get_rng_state()}
    found.statistics = installed.statistics
    return found


def differences(plain: Mapping[str, torch.Tensor | None], other: Mapping[str, torch.Tensor | None]) -> list[str]:
    """Names of tensors that are not bit for bit the same."""
    assert plain.keys() == other.keys()
    return [name for name in plain if not same_bits(plain[name], other[name])]


def assert_same(function: Function, **options: Any) -> Statistics:
    """Plain and replayed runs leave the same bits; returns what the engine did."""
    plain = run(function, replay=False, **options)
    assert plain.error is None, plain.error
    replayed = run(function, replay=True, **options)
    assert replayed.error is None, replayed.error
    assert differences(plain.tensors, replayed.tensors) == []
    assert replayed.statistics is not None
    return replayed.statistics


def snapshot(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Loss, gradients, buffers and random state after a step."""
    found: dict[str, torch.Tensor | None] = {"loss": loss.detach().clone(), "random state": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        found[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
        found[f"parameter {name}"] = parameter.detach().clone()
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = buffer.clone()
    return found


def retained_bytes(fn: Callable[[], Any]) -> tuple[Any, int]:
    """Bytes that `fn` allocated and that are still alive when it returned, by the profiler's memory events."""
    gc.collect()
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = fn()
        events: Any = profile.profiler
        return result, sum(e.nbytes() for e in events.kineto_results.events() if e.name() == "[memory]")
    finally:
        gc.enable()

"""Measure what the mechanism itself costs on this machine, so that plans are not drawn up as if it were free.

Python's own work takes several times as long where the operations before it left its code and objects cold.  So the
mechanism is measured twice: in a loop, and with other data sent through the caches before each operation (see
`processor_caches`).  A model pays something in between, by how much of a core's own cache its operations touch
(`eviction_ratio`).  A tape's backward cannot be interrupted to fill the caches; what replay adds there is measured in a
loop, and scaled by what cold caches made of forward.  Where operations run on a GPU, the processor's caches are
Python's alone; what counts there is the time until all is submitted, on tensors of that GPU, whose streams and
generators are asked for.  There the same goes for the plain step: many of its operations take longer to be asked for than
to be done, so what modules and autograd do around them is measured, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch

from tightfit.device import device_for
from tightfit.profiling.cost_cache import Cost, CostCache
from tightfit.profiling.costs import time_alone
from tightfit.profiling.processor_caches import core_cache_bytes, fill_caches, forget
from tightfit.records import Op, Recipe, Storage, Value
from tightfit.replay.executors import RegionCall
from tightfit.replay.executors.module import ModuleCall
from tightfit.replay.recipe import ResolvedRecipe
from tightfit.replay.session import Installed
from tightfit.replay.statistics import Statistics
from tightfit.step.snapshot import RandomState

_OPS = 16
#: Operations in a module: what Python does around modules is done again when a module is recomputed.
_OPS_PER_MODULE = 4
_ROUNDS = 5
_KEY = "<overhead>"


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds; see the fields of the same names of `Profile`."""

    forward_ms_per_op: float = 0.0
    backward_ms_per_op: float = 0.0
    mode_ms_per_op: float = 0.0
    tape_ms_per_op: float = 0.0
    replay_ms_per_op: float = 0.0
    module_ms_per_op: float = 0.0
    module_ms_per_call: float = 0.0

    def towards(self, other: Overhead, ratio: float) -> Overhead:
        """Return what lies so far (0 to 1) from this to `other`."""
        mine, others = astuple(self), astuple(other)
        return Overhead(*(round(a + ratio * (b - a), 6) for a, b in zip(mine, others, strict=True)))


def measure_overhead(device: torch.device, cache: CostCache, evicted: float) -> Overhead:
    """Measure what each way of not holding what autograd saves costs beside the operations.

    Args:
        device: where the model's operations run.
        cache: what is known, and what is to be remembered.
        evicted: the model's `eviction_ratio`.
    """
    hot = _remembered("hot", device, cache, cold=False)
    return hot.towards(_remembered("cold", device, cache, cold=True), evicted) if device_for(device).is_host else hot


def eviction_ratio(ops: Sequence[Op], values: Sequence[Value], storages: Sequence[Storage]) -> float:
    """Return how much of a core's cache an operation of these replaces by its own data: 0 to 1, their mean."""
    if not ops:
        return 0.0
    whole = core_cache_bytes()
    touched = ({values[value].storage for value in (*op.inputs, *op.outputs)} for op in ops)
    return statistics.fmean(min(1.0, sum(storages[storage].nbytes for storage in found) / whole) for found in touched)


def _remembered(name: str, device: torch.device, cache: CostCache, *, cold: bool) -> Overhead:
    keys = [f"{_KEY} {name} {entry.name} on {device_for(device).kind}" for entry in fields(Overhead)]
    known = [cost.ms for key in keys if (cost := cache.get(key)) is not None]
    if len(known) == len(keys):
        return Overhead(*known)
    random_state = RandomState()
    with torch.enable_grad():
        alone_ms = {} if device_for(device).is_host else _measure_alone(device)
        overhead = Overhead(
            *_measure_plain(device, alone_ms), *_measure_tape(device, cold, alone_ms), *_measure_module(device, cold)
        )
    random_state.restore()
    forget()
    for key, ms in zip(keys, astuple(overhead), strict=True):
        cache.put(key, Cost(ms, 0, ()))
    cache.save()
    return overhead


class _Chain(torch.nn.Module):
    """Operations of one element, in modules; notes what each took until it was submitted."""

    def __init__(self, ops: int, *, cold: bool) -> None:
        super().__init__()
        counts = [_OPS_PER_MODULE] * (ops // _OPS_PER_MODULE) or [ops]
        self.links = torch.nn.ModuleList([_Link(count, cold) for count in counts])

    def forward(self, x: torch.Tensor, times_ms: list[float]) -> torch.Tensor:
        for link in self.links:
            x = link(x, times_ms)
        return x


class _Link(torch.nn.Module):
    def __init__(self, ops: int, cold: bool) -> None:
        super().__init__()
        self._ops = ops
        self._cold = cold

    def forward(self, x: torch.Tensor, times_ms: list[float]) -> torch.Tensor:
        for _ in range(self._ops):
            if self._cold:
                fill_caches()
            begin = time.perf_counter()
            # A view for every operation, as in real models: views are not taped, but the mode sees them, too.
            x = torch.abs(x.view(-1))
            times_ms.append((time.perf_counter() - begin) * 1e3)
        return x


def _weight(device: torch.device) -> torch.Tensor:
    return torch.full((1,), 0.5, device=device, requires_grad=True)


def _measure_alone(device: torch.device) -> dict[str, float]:
    """Return what the chain's operations, of forward and backward, take the host as operations are timed alone."""
    aten = torch.ops.aten
    x = _weight(device).detach()
    timer = device_for(device).operation_timer()
    calls: tuple[tuple[str, Any, tuple[torch.Tensor, ...]], ...]
    calls = ("abs", aten.abs.default, (x,)), ("sgn", aten.sgn.default, (x,)), ("mul", aten.mul.Tensor, (x, x))
    return {
        name: time_alone(timer, func, args, {}, _ROUNDS, grad_enabled=True).host_ms for name, func, args in calls
    }


def _measure_plain(device: torch.device, alone_ms: Mapping[str, float]) -> tuple[float, float]:
    """Return what the host does in a plain step for each operation of forward, and of backward, beside the operation."""
    if not alone_ms:  # the host does them itself, which takes much longer
        return 0.0, 0.0
    chain, weight = _Chain(_OPS, cold=False), _weight(device)
    gradient = torch.ones_like(weight)
    forward: list[float] = []
    backward: list[float] = []
    for _ in range(_ROUNDS):
        device_for(device).synchronize()
        begin = time.perf_counter()
        result = chain(weight, [])
        middle = time.perf_counter()
        result.backward(gradient)
        forward.append((middle - begin) * 1e3 / _OPS)
        backward.append((time.perf_counter() - middle) * 1e3 / _OPS)
        weight.grad = None
    forward_ms = statistics.median(forward) - alone_ms["abs"]
    backward_ms = (statistics.median(backward) - alone_ms["sgn"] - alone_ms["mul"]) / 2
    return round(max(0.0, forward_ms), 6), round(max(0.0, backward_ms), 6)


def _measure_tape(device: torch.device, cold: bool, alone_ms: Mapping[str, float]) -> tuple[float, float, float]:
    """Return what an operation costs in a planned region, further when taped, and when replayed, beside its own time
    where that is known.
    """
    passing, taped = _installed(), Installed(recipes={}, self_check=False)
    contexts: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "plain": nullcontext,
        "mode": lambda: passing.region(_KEY),
        "tape": lambda: taped.region(_KEY),
    }
    chains = _Chain(_OPS, cold=cold), _Chain(_OPS, cold=False)
    weight = _weight(device)
    gradient = torch.ones_like(weight)
    forward: dict[str, list[float]] = {name: [] for name in contexts}
    hot: dict[str, list[float]] = {name: [] for name in contexts}
    backward: dict[str, list[float]] = {name: [] for name in contexts}
    for _ in range(_ROUNDS):
        for name, context in contexts.items():
            device_for(device).synchronize()  # nothing is in the way of what is submitted
            with context():
                chains[0](weight, forward[name])
            with context():
                result = chains[1](weight, hot[name])
            begin = time.perf_counter()
            result.backward(gradient)
            backward[name].append((time.perf_counter() - begin) * 1e3 / _OPS)
            weight.grad = None
    forward_ms, hot_ms, backward_ms = (
        {name: statistics.median(found) for name, found in times.items()} for times in (forward, hot, backward)
    )
    mode_ms = max(0.0, forward_ms["mode"] - forward_ms["plain"])
    record_ms = max(0.0, forward_ms["tape"] - forward_ms["mode"])
    scale = 1.0
    if cold:
        scale = max(1.0, (forward_ms["tape"] - forward_ms["plain"]) / max(1e-6, hot_ms["tape"] - hot_ms["plain"]))
    replay_ms = scale * max(0.0, backward_ms["tape"] - backward_ms["plain"] - alone_ms.get("abs", 0.0))
    return round(mode_ms, 6), round(record_ms, 6), round(replay_ms, 6)


def _measure_module(device: torch.device, cold: bool) -> tuple[float, float]:
    """Return what calling a module again costs: for each operation, and further for each call."""
    chain, hot, single = _Chain(_OPS, cold=cold), _Chain(_OPS, cold=False), _Chain(1, cold=False)
    weight = _weight(device)
    gradient = torch.ones_like(weight)
    plain: list[float] = []
    alone: list[float] = []
    first: list[float] = []
    second: list[float] = []
    calls: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(_ROUNDS):
        device_for(device).synchronize()
        chain(weight, plain)
        hot(weight, alone)
        both: list[float] = []
        _call(chain, weight, both, again=True).backward(gradient)
        first += both[:_OPS]
        second += both[_OPS:]
        for again, times_ms in calls.items():
            if cold:
                fill_caches()
            begin = time.perf_counter()
            result = _call(single, weight, [], again=again)
            spent = time.perf_counter() - begin
            if cold:
                fill_caches()
            begin = time.perf_counter()
            result.backward(gradient)
            times_ms.append((spent + time.perf_counter() - begin) * 1e3)
        weight.grad = None
    # The operation's own time is counted elsewhere, as it is when the same operation runs over and over.
    saving_ms = max(0.0, statistics.median(first) - statistics.median(plain))
    op_ms = saving_ms + max(0.0, statistics.median(second) - statistics.median(alone))
    call_ms = statistics.median(calls[True]) - statistics.median(calls[False]) - op_ms
    return round(op_ms, 6), round(max(0.0, call_ms), 6)


def _call(chain: _Chain, weight: torch.Tensor, times_ms: list[float], *, again: bool) -> torch.Tensor:
    if not again:
        return chain(weight, times_ms)  # type: ignore[no-any-return]  # what it returns is a tensor
    call = RegionCall(chain, chain.forward, (weight,), {"times_ms": times_ms}, Statistics())
    return ModuleCall(call, _OPS, convolves=False).run()  # type: ignore[no-any-return]  # what it returns is a tensor


def _installed() -> Installed:
    """Return a plan for the chain that has no use for its operations."""
    recipe = Recipe(
        class_id=0,
        op_names=("aten.abs.default",) * _OPS,
        lever="tape",
        executor="tape",
        keep=(),
        drop=(),
        replay=(),
        held_bytes=0,
        dropped_bytes=0,
        replay_ms=0.0,
    )
    return Installed(recipes={f"{_KEY}#0": ResolvedRecipe(recipe)}, self_check=False)

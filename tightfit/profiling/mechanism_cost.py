"""Measure what the mechanism itself costs on this machine, so that plans are not drawn up as if it were free.

Python's own work takes several times as long where the operations before it left its code and objects cold.  So the
mechanism is measured twice: in a loop, and with other data sent through the caches before each operation (see
`processor_caches`).  A model pays something in between, by how much of a core's own cache its operations touch
(`eviction_ratio`).  A tape's backward cannot be interrupted to fill the caches; what replay adds there is measured in a
loop, and scaled by what cold caches made of forward.  Where operations run on a GPU, the processor's caches are
Python's alone; what counts there is the time until all is submitted, on tensors of that GPU, whose streams and
generators are asked for.  There the same goes for the plain step: many of its operations take longer to be asked for
than to be done, so what modules and autograd do around them is measured, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass, fields
from functools import partial
from typing import Any

import torch

from tightfit._torch_private.dispatch import DispatchMode
from tightfit.device import device_for
from tightfit.device.stopwatch import Stopwatch
from tightfit.operators.facts import describe
from tightfit.profiling.cost_cache import Cost, CostCache
from tightfit.profiling.costs import time_alone
from tightfit.profiling.processor_caches import core_cache_bytes, fill_caches, forget
from tightfit.records import Op, Recipe, Storage, Value
from tightfit.replay.executors import RegionCall
from tightfit.replay.executors.module import ModuleCall
from tightfit.replay.installed import Installed
from tightfit.replay.recipe import ResolvedRecipe
from tightfit.replay.statistics import Statistics
from tightfit.step.snapshot import RandomState

_LINKS = 4
#: Operations in each of that many modules: what Python does around modules is done again when a module is recomputed.
_LINK = ("aten.abs.default",) * 4
_BLOCK = (
    "aten.native_layer_norm.default",
    "aten.addmm.default",
    "aten.gelu.default",
    "aten.addmm.default",
    "aten.native_dropout.default",
    "aten.add.Tensor",
)
_WIDTH = 8
_ROUNDS = 5
#: Python's work takes at most so many times as long in cold caches. What seems to be more was something else's work.
_MOST_COLD = 6.0
_KEY = "<overhead>"
_OUTER = "<overhead of a step>"


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds; see the fields of the same names of `Profile`."""

    forward_ms_per_op: float = 0.0
    backward_ms_per_op: float = 0.0
    mode_ms_per_op: float = 0.0
    tape_ms_per_op: float = 0.0
    replay_ms_per_op: float = 0.0
    region_ms_per_call: float = 0.0
    module_ms_per_op: float = 0.0
    module_ms_per_call: float = 0.0
    untouched_ms_per_region: float = 0.0
    planned_ms_per_step: float = 0.0

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
    watch = Stopwatch()
    with torch.enable_grad():
        alone = _Alone() if device_for(device).is_host else _measure_alone(device)
        mode_ms, tape_ms, replay_ms, around = _measure_tape(device, cold, alone)
        overhead = Overhead(
            *_measure_plain(device, alone), mode_ms, tape_ms, replay_ms, around.region_ms,
            *_measure_module(device, cold), around.untouched_ms, around.step_ms,
        )  # fmt: skip
    _, is_disturbed = watch.read()
    random_state.restore()
    forget()
    for key, ms in zip(keys, astuple(overhead), strict=True):
        cache.put(key, Cost(ms, 0, (), is_disturbed=is_disturbed))
    cache.save()
    return overhead


class _Chain(torch.nn.Module):
    """Operations on next to no data, in modules; notes what each took until it was submitted.

    On the host they are of one element and kind, as what is measured is little beside what a real one computes.  Beside
    it they are a transformer's: Python's work for an operation depends on how many tensors it reads, makes and saves.
    """

    def __init__(self, device: torch.device, links: int, *, cold: bool = False, short: bool = False) -> None:
        """`short`: no more operations than need be."""
        super().__init__()
        on_host = device_for(device).is_host
        names = _BLOCK if not on_host else _LINK[:1] if short else _LINK
        self.links = torch.nn.ModuleList([_Link(len(names), cold) if on_host else _Block(device) for _ in range(links)])
        self.op_names = links * names

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


class _Block(torch.nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(_WIDTH, device=device)
        self.up, self.down = (torch.nn.Linear(_WIDTH, _WIDTH, device=device) for _ in range(2))
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, times_ms: list[float]) -> torch.Tensor:
        begin = time.perf_counter()
        y = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        x = x + self.dropout(y)
        times_ms.append((time.perf_counter() - begin) * 1e3 / len(_BLOCK))
        return x


def _weight(device: torch.device) -> torch.Tensor:
    size = (1,) if device_for(device).is_host else (1, _WIDTH)
    return torch.full(size, 0.5, device=device, requires_grad=True)


class _Calls(DispatchMode):
    """Writes down the operations that run; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not describe(func).is_view:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class _Alone:
    """What the chain's operations take the host as operations are timed alone, and how many backward has."""

    forward_ms: float = 0.0
    backward_ms: float = 0.0
    backward_count: int = 0


def _measure_alone(device: torch.device) -> _Alone:
    """Time the operations of forward and of backward of a link, each alone."""
    chain, weight = _Chain(device, 1), _weight(device)
    timer = device_for(device).operation_timer()
    with _Calls() as forward:
        result = chain(weight, [])
    with _Calls() as backward:
        result.backward(torch.ones_like(weight))
    parts_ms = [
        [time_alone(timer, func, args, kwargs, _ROUNDS, grad_enabled=True).host_ms for func, args, kwargs in part.calls]
        for part in (forward, backward)
    ]
    return _Alone(statistics.fmean(parts_ms[0]), statistics.fmean(parts_ms[1]), len(backward.calls))


def _measure_plain(device: torch.device, alone: _Alone) -> tuple[float, float]:
    """Return what the host does in a plain step beside an operation of forward, and beside one of backward."""
    if not alone.backward_count:  # the host does them itself, which takes much longer
        return 0.0, 0.0
    chain, weight = _Chain(device, _LINKS), _weight(device)
    gradient = torch.ones_like(weight)
    forward: list[float] = []
    backward: list[float] = []
    for _ in range(_ROUNDS):
        device_for(device).synchronize()
        begin = time.perf_counter()
        result = chain(weight, [])
        middle = time.perf_counter()
        result.backward(gradient)
        forward.append((middle - begin) * 1e3 / len(chain.op_names))
        backward.append((time.perf_counter() - middle) * 1e3 / (_LINKS * alone.backward_count))
        weight.grad = None
        chain.zero_grad()
    beside_ms = statistics.median(forward) - alone.forward_ms, statistics.median(backward) - alone.backward_ms
    return round(max(0.0, beside_ms[0]), 6), round(max(0.0, beside_ms[1]), 6)


@dataclass(frozen=True, slots=True)
class _Around:
    """What the host does around the operations of a planned step: in it all, in each region, in each that is taped."""

    step_ms: float = 0.0
    untouched_ms: float = 0.0
    region_ms: float = 0.0


def _measure_tape(device: torch.device, cold: bool, alone: _Alone) -> tuple[float, float, float, _Around]:
    """Return what an operation costs in a planned region, further when taped, and when replayed, beside its own time
    where that is known; and what is done around operations, beside the host.
    """
    chains = _Chain(device, _LINKS, cold=cold), _Chain(device, _LINKS)
    single = _Chain(device, 1)
    plans = {name: _installed(chains[0].op_names, name) for name in ("step", "untouched", "mode", "tape")}
    contexts: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "plain": nullcontext,
        "step": lambda: plans["step"].region(_OUTER),
        **{name: partial(_inside, plans[name]) for name in ("untouched", "mode", "tape")},
    }
    if not alone.backward_count:
        del contexts["step"], contexts["untouched"]
    weight = _weight(device)
    gradient = torch.ones_like(weight)
    forward: dict[str, list[float]] = {name: [] for name in contexts}
    hot: dict[str, list[float]] = {name: [] for name in contexts}
    backward: dict[str, list[float]] = {name: [] for name in contexts}
    whole: dict[str, list[float]] = {name: [] for name in contexts}
    small: dict[str, list[float]] = {name: [] for name in contexts}
    for _ in range(_ROUNDS):
        for name, context in contexts.items():
            device_for(device).synchronize()  # nothing is in the way of what is submitted
            with context():
                chains[0](weight, forward[name])
            begin = time.perf_counter()
            with context():
                result = chains[1](weight, hot[name])
            whole[name].append((time.perf_counter() - begin) * 1e3)
            if alone.backward_count:
                begin = time.perf_counter()
                with context():
                    short = single(weight, [])
                small[name].append((time.perf_counter() - begin) * 1e3)
                del short  # frees what it holds
            begin = time.perf_counter()
            result.backward(gradient)
            backward[name].append((time.perf_counter() - begin) * 1e3 / len(chains[1].op_names))
            weight.grad = None
            chains[1].zero_grad()
    forward_ms, hot_ms = ({name: statistics.median(found) for name, found in times.items()} for times in (forward, hot))
    backward_ms = {name: min(found) for name, found in backward.items()}  # of few: other work only adds to them
    around = _Around()
    if alone.backward_count:  # there Python's work is all that counts, and some of it is done when a region ends
        whole_ms, small_ms = (
            {name: statistics.median(found) for name, found in times.items()} for times in (whole, small)
        )
        more = len(chains[1].op_names) - len(single.op_names)
        forward_ms = {name: (whole_ms[name] - small_ms[name]) / more for name in contexts}
        of_ops_ms = len(single.op_names) * (forward_ms["tape"] - forward_ms["plain"])
        step_ms, region_ms = small_ms["step"] - small_ms["plain"], small_ms["untouched"] - small_ms["step"]
        taped_ms = small_ms["tape"] - small_ms["untouched"] - of_ops_ms
        # A call of a module ends what its caller ran before and begins what that runs then: two regions for each.
        around = _Around(*(round(max(0.0, ms), 6) for ms in (step_ms, region_ms / 2, taped_ms)))
    mode_ms = max(0.0, forward_ms["mode"] - forward_ms["plain"])
    record_ms = max(0.0, forward_ms["tape"] - forward_ms["mode"])
    scale = 1.0
    if cold:
        scale = _cold_by_hot(*(found["tape"] - found["plain"] for found in (forward_ms, hot_ms)))
    replay_ms = scale * max(0.0, backward_ms["tape"] - backward_ms["plain"] - alone.forward_ms)
    return round(mode_ms, 6), round(record_ms, 6), round(replay_ms, 6), around


@contextmanager
def _inside(plan: Installed) -> Iterator[None]:
    """Open a region inside a step."""
    with plan.region(_OUTER), plan.region(_KEY):
        yield


def _cold_by_hot(cold_ms: float, hot_ms: float) -> float:
    """Return how many times as long Python's work takes in cold caches; two measurements may say anything."""
    return min(max(1.0, cold_ms / max(1e-6, hot_ms)), _MOST_COLD)


def _measure_module(device: torch.device, cold: bool) -> tuple[float, float]:
    """Return what calling a module again costs: for each operation, and further for each call."""
    chain, hot = _Chain(device, _LINKS, cold=cold), _Chain(device, _LINKS)
    single = _Chain(device, 1, short=True)
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
        first += both[: len(both) // 2]
        second += both[len(both) // 2 :]
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
    of_ops_ms = len(single.op_names) * op_ms
    call_ms = statistics.median(calls[True]) - statistics.median(calls[False]) - of_ops_ms
    return round(op_ms, 6), round(max(0.0, call_ms), 6)


def _call(chain: _Chain, weight: torch.Tensor, times_ms: list[float], *, again: bool) -> torch.Tensor:
    if not again:
        return chain(weight, times_ms)  # type: ignore[no-any-return]  # what it returns is a tensor
    call = RegionCall(chain, chain.forward, (weight,), {"times_ms": times_ms}, Statistics())
    return ModuleCall(call, len(chain.op_names), convolves=False).run()  # type: ignore[no-any-return]  # what it returns is a tensor


def _installed(op_names: tuple[str, ...], name: str) -> Installed:
    """Return a plan for the chain: "untouched", with no use for its operations ("mode"), with all dropped ("tape")."""
    around: dict[str, ResolvedRecipe | None] = {f"{_OUTER}#0": None, f"{_OUTER}#0/1": None}
    if name == "untouched":
        around[f"{_KEY}#0"] = None
    if name == "mode":
        recipe = Recipe(
            class_id=0,
            op_names=op_names,
            lever="tape",
            executor="tape",
            keep=(),
            drop=(),
            replay=(),
            held_bytes=0,
            dropped_bytes=0,
            replay_ms=0.0,
        )
        around[f"{_KEY}#0"] = ResolvedRecipe(recipe)
    return Installed(recipes=around, self_check=False)

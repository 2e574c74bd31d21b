"""Measure what the mechanism itself costs on this machine, so that plans are not drawn up as if it were free.

What is measured is a transformer's block with next to no data: Python's work for an operation depends on how many
tensors it reads, makes and saves, on the views between operations, and on how alike these are.

Python's own work takes several times as long where what ran before it left its code and objects cold.  So it is also
found how many times: with other code run before each operation, and with other data sent through the caches (see
`processor_caches`).  A model pays something in between, by how much of a core's own cache its operations touch
(`eviction_ratio`).  A tape's backward cannot be interrupted: what cold caches made of forward counts for it, too.

Where operations run on a GPU, the processor's caches are Python's alone; what counts there is the time until all is
submitted, on tensors of that GPU, whose streams and generators are asked for.  There the same goes for the plain step:
many of its operations take longer to be asked for than to be done, so what modules and autograd do around them is
measured, too.
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
from tightfit.profiling.processor_caches import core_cache_bytes, fill_caches, forget, run_other_code
from tightfit.records import Op, Recipe, Storage, Value
from tightfit.replay.executors import RegionCall
from tightfit.replay.executors.module import ModuleCall
from tightfit.replay.installed import Installed
from tightfit.replay.recipe import ResolvedRecipe
from tightfit.replay.statistics import Statistics
from tightfit.step.open_autocast import without_open_autocast
from tightfit.step.own_steps import own_steps
from tightfit.step.snapshot import RandomState

#: What is done before each operation, so that it does not find the caches as in a loop.
_Between = Callable[[], None] | None
_LINKS = 4
#: Operations in each of that many modules.
_BLOCK = (
    "aten.native_layer_norm.default",
    "aten.addmm.default",
    "aten.gelu.default",
    "aten.addmm.default",
    "aten.add.Tensor",
    "aten.native_dropout.default",  # not on the host, where it is several
)
_WIDTH = 8
_ROUNDS = 5
#: Of what takes next to no time: differences of few rounds would decide which lever a plan takes.
_HOT_ROUNDS = 15
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
    if not device_for(device).is_host:
        return _remembered("alone", device, cache, None)
    warm, cold = (_remembered(one.__name__, device, cache, one) for one in (run_other_code, fill_caches))
    return warm.towards(cold, evicted)


def eviction_ratio(ops: Sequence[Op], values: Sequence[Value], storages: Sequence[Storage]) -> float:
    """Return how much of a core's cache an operation of these replaces by its own data: 0 to 1, their mean."""
    if not ops:
        return 0.0
    whole = core_cache_bytes()
    touched = ({values[value].storage for value in (*op.inputs, *op.outputs)} for op in ops)
    return statistics.fmean(min(1.0, sum(storages[storage].nbytes for storage in found) / whole) for found in touched)


def _remembered(name: str, device: torch.device, cache: CostCache, between: _Between) -> Overhead:
    """Return the overhead where `between` is done before each operation."""
    keys = [f"{_KEY} {name} {entry.name} on {device_for(device).kind}" for entry in fields(Overhead)]
    known = [cost.ms for key in keys if (cost := cache.get(key)) is not None]
    if len(known) == len(keys):
        return Overhead(*known)
    random_state = RandomState()
    watch = Stopwatch()
    try:
        # Its backwards are no step of the user's, and an open autocast is not the model's.
        with own_steps(), torch.enable_grad(), without_open_autocast(device):
            alone = _measure_alone(device)
            mode_ms, tape_ms, replay_ms, around = _measure_tape(device, between, alone)
            overhead = Overhead(
                *_measure_plain(device, alone), mode_ms, tape_ms, replay_ms, around.region_ms,
                *_measure_module(device, between), around.untouched_ms, around.step_ms,
            )  # fmt: skip
        _, is_disturbed = watch.read()
    finally:
        random_state.restore()
        forget()
    for key, ms in zip(keys, astuple(overhead), strict=True):
        cache.put(key, Cost(ms, 0, (), is_disturbed=is_disturbed))
    cache.save()
    return overhead


class _Chain(torch.nn.Module):
    """Blocks of a transformer on next to no data; notes what each operation took until it was submitted."""

    def __init__(self, device: torch.device, links: int, between: _Between = None, *, short: bool = False) -> None:
        """`between`: what is done before each operation. `short`: no more operations than need be."""
        super().__init__()
        on_host = device_for(device).is_host
        names = _BLOCK[: 1 if short and on_host else len(_BLOCK) - on_host]
        self.links = torch.nn.ModuleList(_Block(device, len(names), between) for _ in range(links))
        self.op_names = links * names

    def forward(self, x: torch.Tensor, times_ms: list[float]) -> torch.Tensor:
        for link in self.links:
            x = link(x, times_ms)
        return x


class _Block(torch.nn.Module):
    def __init__(self, device: torch.device, ops: int, between: _Between) -> None:
        super().__init__()
        norm = torch.nn.LayerNorm(_WIDTH, device=device)
        up, down = (torch.nn.Linear(_WIDTH, _WIDTH, device=device) for _ in range(2))
        dropout = torch.nn.Dropout(0.1)
        self.layers = torch.nn.ModuleList([norm, up, down, dropout])
        self._between = between
        self._steps: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...] = (
            lambda _, y: norm(y),
            lambda _, y: up(y),
            lambda _, y: torch.nn.functional.gelu(y.view(1, 2, -1).transpose(0, 1)),
            lambda _, y: down(y.transpose(0, 1).view(1, -1)),
            lambda x, y: x + y,
            lambda _, y: dropout(y),
        )[:ops]

    def forward(self, x: torch.Tensor, times_ms: list[float]) -> torch.Tensor:
        y = x
        for step in self._steps:
            if self._between is not None:
                self._between()
            begin = time.perf_counter()
            y = step(x, y)
            times_ms.append((time.perf_counter() - begin) * 1e3)
        return y


def _weight(device: torch.device) -> torch.Tensor:
    return torch.full((1, _WIDTH), 0.5, device=device, requires_grad=True)


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

    forward_ms: float
    backward_ms: float
    backward_count: int


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
    if device_for(device).is_host:  # it does them itself, which takes much longer
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

    step_ms: float
    untouched_ms: float
    region_ms: float


def _measure_tape(device: torch.device, between: _Between, alone: _Alone) -> tuple[float, float, float, _Around]:
    """Return what an operation costs in a planned region, further when taped, and when replayed, beside its own time;
    and what is done around operations.
    """
    chains = _Chain(device, _LINKS, between), _Chain(device, _LINKS)
    single = _Chain(device, 1)
    contexts, of_single = _ways(chains[0].op_names), _ways(single.op_names)
    weight = _weight(device)
    gradient = torch.ones_like(weight)
    cold_ops, hot_ops, *found = ({name: list[float]() for name in contexts} for _ in range(6))
    whole, small, whole_backward, small_backward = found
    for number in range(_HOT_ROUNDS):
        for name, context in contexts.items():
            if between is not None and number < _ROUNDS:
                with context():
                    chains[0](weight, cold_ops[name])
            device_for(device).synchronize()  # nothing is in the way of what is submitted
            for chain, way, times, backward in (
                (chains[1], context, whole, whole_backward),
                (single, of_single[name], small, small_backward),
            ):
                begin = time.perf_counter()
                with way():
                    result = chain(weight, hot_ops[name])
                middle = time.perf_counter()
                result.backward(gradient)
                times[name].append((middle - begin) * 1e3)
                backward[name].append((time.perf_counter() - middle) * 1e3)
                del result  # frees what it holds
                weight.grad = None
                chain.zero_grad()
    whole_ms, small_ms, whole_backward_ms, small_backward_ms = (  # other work only adds to them
        {name: min(times) for name, times in one.items()} for one in found
    )
    ops = len(single.op_names)
    more = len(chains[1].op_names) - ops
    forward_ms = {name: (whole_ms[name] - small_ms[name]) / more for name in contexts}
    backward_ms = {name: (whole_backward_ms[name] - small_backward_ms[name]) / more for name in contexts}
    in_forward_ms, in_backward_ms = (one["tape"] - one["plain"] for one in (forward_ms, backward_ms))
    taped_ms = small_ms["tape"] - small_ms["untouched"] - ops * in_forward_ms
    taped_ms += small_backward_ms["tape"] - small_backward_ms["plain"] - ops * in_backward_ms
    scale = 1.0
    if between is not None:
        medians = ({name: statistics.median(one[name]) for name in ("plain", "tape")} for one in (cold_ops, hot_ops))
        scale = _cold_by_hot(*(one["tape"] - one["plain"] for one in medians))
    mode_ms, record_ms, replay_ms, step_ms, region_ms, taped_ms = (
        round(scale * max(0.0, ms), 6)
        for ms in (
            forward_ms["mode"] - forward_ms["plain"],
            forward_ms["tape"] - forward_ms["mode"],
            in_backward_ms - alone.forward_ms,
            small_ms["step"] - small_ms["plain"],
            # A call of a module ends what its caller ran before and begins what that runs then: two regions for each.
            (small_ms["untouched"] - small_ms["step"]) / 2,
            taped_ms,
        )
    )
    return mode_ms, record_ms, replay_ms, _Around(step_ms, region_ms, taped_ms)


def _ways(op_names: tuple[str, ...]) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """Return the contexts in which a chain of these operations is measured, by their names."""
    plans = {name: _installed(op_names, name) for name in ("step", "untouched", "mode", "tape")}
    inside = {name: partial(_inside, plan) for name, plan in plans.items()}
    return {"plain": nullcontext, **inside, "step": lambda: plans["step"].region(_OUTER)}


@contextmanager
def _inside(plan: Installed) -> Iterator[None]:
    """Open a region inside a step."""
    with plan.region(_OUTER), plan.region(_KEY):
        yield


def _cold_by_hot(cold_ms: float, hot_ms: float) -> float:
    """Return how many times as long Python's work takes in cold caches; two measurements may say anything."""
    return min(max(1.0, cold_ms / max(1e-6, hot_ms)), _MOST_COLD)


def _measure_module(device: torch.device, between: _Between) -> tuple[float, float]:
    """Return what calling a module again costs: for each operation, and further for each call."""
    chain, hot = _Chain(device, _LINKS, between), _Chain(device, _LINKS)
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
            if between is not None:
                between()
            begin = time.perf_counter()
            result = _call(single, weight, [], again=again)
            spent = time.perf_counter() - begin
            if between is not None:
                between()
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

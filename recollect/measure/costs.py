"""What each distinct operation costs, measured by running it alone on made-up data of the right shapes.

Time: the minimum of a few runs, the runs of all operations interleaved so that a burst of other work on the machine
does not fall on one of them.  Scratch: the most memory the operation held inside, beyond inputs and outputs, which no
dispatcher shows (convolutions, attention); on CPU from the profiler's memory events, on CUDA from the allocator.

Made-up data: floats in [0.1, 0.9), integers zero (a valid index everywhere), booleans true.  An operation that cannot
be run on such data is given the time and scratch zero.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from recollect._torch_private import (
    below_autograd,
    profiler_memory_events,
    profiler_ranges,
    set_grad_enabled_quietly,
)
from recollect.measure.signatures import Call, TensorSpec
from recollect.measure.state import RandomState
from recollect.records import Signature

_ROUNDS = 3
_LONG_RUN_MS = 60.0
_PREFIX = "recollect-op-"


def measure_costs(calls: Sequence[Call], device: torch.device) -> tuple[Signature, ...]:
    """Time and scratch of each call.  Leaves every random generator as it was."""
    random_state = RandomState()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _measure(calls, device)
    finally:
        random_state.restore()


def _measure(calls: Sequence[Call], device: torch.device) -> tuple[Signature, ...]:
    scratch = _scratch_cuda(calls, device) if device.type == "cuda" else _scratch_cpu(calls)
    best: dict[int, float] = {}
    for round_number in range(_ROUNDS):
        for index, call in enumerate(calls):
            if index not in scratch or (round_number > 0 and best.get(index, 0.0) > _LONG_RUN_MS):
                continue
            elapsed = _time_ms(call, device, repeats=1 if round_number == 0 else 2)
            if elapsed is not None:
                best[index] = min(best.get(index, elapsed), elapsed)
    return tuple(
        Signature(name=str(call.func), ms=round(best.get(index, 0.0), 6), scratch_bytes=scratch.get(index, 0))
        for index, call in enumerate(calls)
    )


def _run(call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
    with below_autograd():
        set_grad_enabled_quietly(call.grad_enabled)
        return call.func(*args, **kwargs)


def _time_ms(call: Call, device: torch.device, repeats: int) -> float | None:
    try:
        args, kwargs = _make_up(call)
        best = float("inf")
        for _ in range(repeats):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            _run(call, args, kwargs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, (time.perf_counter() - begin) * 1e3)
        return best
    except Exception:
        return None


def _scratch_cpu(calls: Sequence[Call]) -> dict[int, int]:
    found: dict[int, int] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for index, call in enumerate(calls):
            try:
                args, kwargs = _make_up(call)
                with torch.profiler.record_function(f"{_PREFIX}{index}"):
                    result = _run(call, args, kwargs)
                found[index] = 0
                del result
            except Exception:
                continue
    ranges = profiler_ranges(profile, _PREFIX)
    events = profiler_memory_events(profile)
    position = 0
    for index in sorted(found):
        start, end = ranges[f"{_PREFIX}{index}"]
        level = peak = 0
        while position < len(events) and events[position][0] < start:
            position += 1
        while position < len(events) and events[position][0] <= end:
            level += events[position][1]
            peak = max(peak, level)
            position += 1
        found[index] = max(0, peak - max(level, 0))
    return found


def _scratch_cuda(calls: Sequence[Call], device: torch.device) -> dict[int, int]:
    found: dict[int, int] = {}
    for index, call in enumerate(calls):
        try:
            args, kwargs = _make_up(call)
            torch.cuda.reset_peak_memory_stats(device)
            result = _run(call, args, kwargs)
            found[index] = max(0, torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device))
            del result
        except Exception:
            continue
    return found


def _make_up(call: Call) -> tuple[list[Any], dict[str, Any]]:
    return [_value(a) for a in call.args], {name: _value(a) for name, a in call.kwargs}


def _value(argument: Any) -> Any:
    if isinstance(argument, TensorSpec):
        return _tensor(argument)
    if isinstance(argument, tuple):
        return [_value(a) for a in argument]
    if isinstance(argument, str) and argument.startswith("<"):
        raise ValueError("an argument that cannot be made up")
    return argument


def _tensor(spec: TensorSpec) -> torch.Tensor:
    if spec.nbytes == 0:
        return torch.empty(spec.size, dtype=spec.dtype, device=spec.device)
    whole = torch.empty(spec.nbytes // spec.dtype.itemsize, dtype=spec.dtype, device=spec.device)
    if spec.dtype.is_floating_point:
        whole.uniform_(0.1, 0.9)
    elif spec.dtype.is_complex:
        torch.view_as_real(whole).uniform_(0.1, 0.9)
    else:
        whole.fill_(1 if spec.dtype is torch.bool else 0)
    return whole.as_strided(spec.size, spec.stride, spec.offset)

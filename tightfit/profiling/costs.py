"""What each distinct operation costs, measured by running it alone on made-up data of the right shapes.

Time: the minimum of a few runs, the runs of all operations interleaved so that a burst of other work on the machine
does not fall on one of them.  On a GPU there are two times, the host's and the device's, see `Device.operation_timer`.
On a CPU, an operation that moves much data is timed with its arguments out of the caches
(see `processor_caches`), less what that costs an operation without data: its code is then cold, too, which in a step of
some hundred operations of the same kinds it is not.  Workspace: the most memory the operation held inside, beyond
inputs and outputs, which no dispatcher shows (convolutions, attention); see `Device.workspace_meter`.

Made-up data: floats in [0.1, 0.9), integers zero (a valid index everywhere), booleans true.  An operation that cannot
be run on such data is estimated by its size; so is one that a made-up argument could crash: anything outside ATen
(where a step runs with data, it is metered there), and backward kernels that read a buffer which only their own forward
can fill (cuDNN's and oneDNN's RNNs get it from one). An argument on the wrong device crashes, too: a kernel that
expects a random seed in host memory reads it there.  So once an operation returns a result elsewhere than its fake
kernel said, only operations like it are run; the others wait for the next fake run, which knows where their arguments
are.  An operation that breaks the device all the same (an assertion in a kernel, an access out of bounds) ends the
process's work with its name; with a cost cache, it is not run alone again.

What a machine has measured once is remembered by `cost_cache`.

Within the budget: made-up arguments are copies beside the model.  An optimizer's foreach operation over all parameters
would double its state; where that does not fit, it is run on the largest of its tensors that do and the figures scaled.
An operation that then runs out of memory, because of its workspace, is run on half of the batch, and half of that.
What does not fit at all is estimated, too: its time from operations of the same name, else from all; its workspace
from the operation of the same name that is nearest in size, and never above the operation's own arguments and results.
Tiny operations say little of large ones, and a trial run finds what is missing, but nothing finds a budget that was
refused for too much.  Such figures carry a note and are not cached.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tightfit._torch_private.autograd import set_grad_mode
from tightfit._torch_private.dispatch import below_autograd, find_overload
from tightfit.device import Device, device_for
from tightfit.device.device import OperationTimer, OperationTimes
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.interrupts import pass_on, safe_point
from tightfit.profiling.broken_device import BrokenBy, device_lost, require_usable
from tightfit.profiling.cost_cache import Cost, CostCache
from tightfit.profiling.output_strides import Layouts, elsewhere, layouts_of
from tightfit.profiling.partial_call import argument_bytes, fit_call, half_of
from tightfit.profiling.processor_caches import fill_caches, forget
from tightfit.profiling.signatures import Call, TensorSpec
from tightfit.progress import progress
from tightfit.records import Signature
from tightfit.step.snapshot import RandomState

_ROUNDS = 3
#: How often a call that runs out of memory is made shorter by half.
_HALVINGS = 6
_LONG_RUN_MS = 60.0
#: Of the memory that measuring may take, what a timer may at most.
_TIMERS_SHARE = 0.25
#: Arguments of an operation that are likely to be out of the caches when it runs.
_MUCH_DATA_BYTES = 256 << 10
_COLD_ROUNDS = 9
#: Numbers drawn to fill an operation's argument, at most: they fit a cache, and are copied from there.
_DRAWN = 1 << 14
#: What an operation takes where none could be run alone that would say more.
_CALL_MS = 0.005
_MS_PER_BYTE = 1e-7
#: Read opaque state (a reserve buffer, packed weights) whose contents they trust.
_OPAQUE = frozenset(
    {
        "aten.miopen_rnn_backward.default",
        "aten.miopen_rnn.default",
        "aten._ctc_loss_backward.default",
        "aten._cudnn_ctc_loss.default",
    }
)


@dataclass(frozen=True, slots=True)
class RunAlone:
    """What running one operation alone showed."""

    workspace_bytes: int
    layouts: Layouts


@dataclass(kw_only=True)
class Costs:
    """What every call costs, and what finding that out took."""

    signatures: tuple[Signature, ...] = ()
    layouts: dict[int, Layouts] = field(default_factory=dict)
    """By the call's number, how its results lie in memory."""
    workspace_ms: float = 0.0
    """Time spent on finding workspaces and sizes."""
    times_ms: float = 0.0
    """Time spent on finding times."""


def measure_costs(
    calls: Sequence[Call],
    device: torch.device,
    cache: CostCache,
    *,
    timed: bool = True,
    room_bytes: int | None = None,
    result_bytes: Mapping[int, int] | None = None,
    fake_layouts: Mapping[int, Layouts] | None = None,
    measured: Mapping[int, Cost] | None = None,
) -> Costs:
    """Return time, workspace and output sizes of each call, from the cache where it knows them.

    Args:
        calls: what to measure.
        device: where.
        cache: what is known, and what is to be remembered.
        timed: False leaves times that the cache does not know at zero; give no cache then.
        room_bytes: memory that measuring may take; None: as much as it needs.
        result_bytes: by the call's number, memory that its results take.
        fake_layouts: by the call's number, how its results lie in memory according to a fake run, if there was one.
        measured: by the call's number, what is known already.

    Leaves every random generator as it was.
    """
    result_bytes = result_bytes or {}
    fake_layouts = fake_layouts or {}
    timer_bytes = device_for(device).timer_bytes() if timed else 0
    if room_bytes is not None:
        timer_bytes = timer_bytes if timer_bytes <= room_bytes * _TIMERS_SHARE else 0
        room_bytes -= timer_bytes
    known = {index: cost for index, call in enumerate(calls) if (cost := cache.get(call)) is not None}
    known.update(measured or {})
    found = {index: cost for index, cost in known.items() if not cost.is_dangerous}
    shares = {
        index: fit_call(call, result_bytes.get(index, 0), room_bytes)
        for index, call in enumerate(calls)
        if index not in known
    }
    to_run = {index: share.call for index, share in shares.items() if share.call is not None}
    misplacing = {
        calls[index].func for index, cost in found.items() if elsewhere(fake_layouts.get(index, ()), cost.layouts)
    }
    said = {index: fake_layouts.get(index, ()) for index in to_run}
    result = Costs()
    random_state = RandomState()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            device_for(device).start_libraries({str(call.func) for call in to_run.values()})
            alone, too_large = _run_each(to_run, said, misplacing, device_for(device), result) if to_run else ({}, [])
            # Its workspace, which nobody knew, did not fit beside its arguments.
            for _ in range(_HALVINGS if too_large else 0):
                shares.update({index: half_of(shares[index]) for index in too_large})
                parts = {index: call for index in too_large if (call := shares[index].call) is not None}
                to_run |= parts
                again, too_large = _run_each(parts, said, misplacing, device_for(device), result)
                alone |= again
            timer = device_for(device).operation_timer(timer_bytes) if to_run and timed else None
            times = _time_each(to_run, alone, timer, device_for(device).is_host, result)
    except BrokenBy as broken:
        cache.put_dangerous(broken.call)
        raise device_lost(broken, device) from broken
    except BaseException:
        random_state.restore()
        raise
    random_state.restore()
    for index in to_run.keys() - times.keys():
        shares[index] = shares[index].given_up()
    for index, cost in times.items():
        found[index] = shares[index].scaled(cost)
        if not shares[index].note:
            cache.put(calls[index], cost)
    cache.save()
    result.layouts = {index: cost.layouts for index, cost in found.items()}
    sizes = [argument_bytes(call) + result_bytes.get(index, 0) for index, call in enumerate(calls)]
    names = [str(call.func) for call in calls]
    costs = {i: found[i] if i in found else _estimate(i, names, sizes, found, timed) for i in range(len(calls))}
    result.signatures = tuple(
        Signature(
            name=name,
            ms=costs[index].ms,
            device_ms=costs[index].device_ms,
            workspace_bytes=costs[index].workspace_bytes,
            note=shares[index].note if index in shares else "",
        )
        for index, name in enumerate(names)
    )
    return result


def _estimate(index: int, names: Sequence[str], sizes: Sequence[int], known: Mapping[int, Cost], timed: bool) -> Cost:
    """Estimate what an operation that cannot be run alone costs, by its size and what others cost for theirs."""
    alike = [other for other in known if names[other] == names[index] and sizes[other]]
    rivals = alike or [other for other in known if sizes[other]]
    if not rivals:
        return Cost(round(_CALL_MS + sizes[index] * _MS_PER_BYTE, 6) if timed else 0.0, 0, ())
    by_size = statistics.median(known[other].slower_ms / sizes[other] for other in rivals) * sizes[index]
    least_ms = min(known[other].ms for other in rivals)  # whatever it moves, it is called
    on_device = any(known[other].device_ms for other in rivals)
    ms, device_ms = (least_ms, by_size) if on_device else (max(by_size, least_ms), 0.0)
    workspace_bytes = 0
    if alike:
        nearest = min(alike, key=lambda other: abs(math.log(max(1, sizes[index]) / sizes[other])))
        scaled_bytes = known[nearest].workspace_bytes * sizes[index] // sizes[nearest]
        workspace_bytes = min(scaled_bytes, max(sizes[index], known[nearest].workspace_bytes))
    return Cost(round(ms, 6), workspace_bytes, (), round(device_ms, 6))


def _time_each(
    calls: Mapping[int, Call],
    alone: Mapping[int, RunAlone],
    timer: OperationTimer | None,
    on_host: bool,
    result: Costs,
) -> dict[int, Cost]:
    """Return the cost of each call that could be run alone, by its number. `timer`: None leaves times at zero."""
    begin = time.perf_counter()
    best: dict[int, OperationTimes] = {}
    if timer is None:
        best = dict.fromkeys(alone, OperationTimes(0.0))
    else:
        cold_code_ms = _cold_code_ms() if on_host and calls else 0.0
        for round_number in range(_ROUNDS):
            for place, (index, call) in enumerate(calls.items()):
                known = best.get(index)
                is_long = known is not None and max(known) > _LONG_RUN_MS and not known.is_disturbed
                if index not in alone or (round_number > 0 and is_long):
                    continue
                safe_point()
                progress("timing operations", round_number * len(calls) + place, _ROUNDS * len(calls))
                repeats = 1 if round_number == 0 else 2
                found = _times_ms(call, timer, repeats)
                if found is None:
                    continue
                if on_host and argument_bytes(call) >= _MUCH_DATA_BYTES and found.host_ms < _LONG_RUN_MS:
                    in_cold = _times_ms(call, timer, repeats, cold=True)
                    if in_cold is not None:
                        host_ms = max(found.host_ms, in_cold.host_ms - cold_code_ms)
                        found = OperationTimes(host_ms, 0.0, found.is_disturbed or in_cold.is_disturbed)
                best[index] = found.or_less(known or found)
        forget()
    result.times_ms = (time.perf_counter() - begin) * 1e3
    return {
        index: Cost(
            round(times.host_ms, 6),
            found.workspace_bytes,
            found.layouts,
            round(times.device_ms, 6),
            is_disturbed=times.is_disturbed,
        )
        for index, found in alone.items()
        if (times := best.get(index)) is not None
    }


def _run(call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
    with below_autograd():
        set_grad_mode(call.grad_enabled)
        return call.func(*args, **kwargs)


def time_alone(
    timer: OperationTimer,
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    repeats: int,
    *,
    grad_enabled: bool,
) -> OperationTimes:
    """Return the shortest times of an operation, without autograd, on a device beside the host."""
    with below_autograd():
        set_grad_mode(grad_enabled)
        return timer.times_ms(lambda: func(*args, **kwargs), repeats)


def _cold_code_ms() -> float:
    """Measure how much longer an operation without data takes when the caches are full of other things."""
    x = torch.ones(1)
    times_ms: dict[bool, list[float]] = {False: [], True: []}
    for cold in (False, True) * _COLD_ROUNDS:
        if cold:
            fill_caches()
        begin = time.perf_counter()
        torch.abs(x)
        times_ms[cold].append((time.perf_counter() - begin) * 1e3)
    return max(0.0, statistics.median(times_ms[True]) - min(times_ms[False]))


def _times_ms(call: Call, timer: OperationTimer, repeats: int, *, cold: bool = False) -> OperationTimes | None:
    try:
        args, kwargs = _make_up(call)
        if timer.device.is_host:
            return timer.times_ms(lambda: _run(call, args, kwargs), repeats, before=fill_caches if cold else None)
        return time_alone(timer, call.func, args, kwargs, repeats, grad_enabled=call.grad_enabled)
    except Exception as error:
        pass_on(error)
        require_usable(timer.device, call)
        return None


def _run_each(
    calls: Mapping[int, Call],
    fake_layouts: Mapping[int, Layouts],
    misplacing: set[Any],
    device: Device,
    costs: Costs,
) -> tuple[dict[int, RunAlone], list[int]]:
    """Run each call once, for its workspace and the layouts of its results; calls that cannot be run have none.

    `misplacing`: operators known to return results elsewhere than their fake kernels say; those that are found are
    added. From then on no others are run.  Also return which calls ran out of memory.
    """
    begin = time.perf_counter()
    layouts: dict[int, Layouts] = {}
    too_large: list[int] = []
    args: Any
    kwargs: Any
    result: Any
    with device.workspace_meter() as meter:
        for place, (index, call) in enumerate(calls.items()):
            safe_point()
            progress("running operations alone", place, len(calls))
            if misplacing and call.func not in misplacing:
                continue
            try:
                args, kwargs = _make_up(call)
                with meter.watch(index):
                    result = _run(call, args, kwargs)
                device.synchronize()  # what fails on a device fails here, not in the next operation
                layouts[index] = layouts_of(result, (*args, *kwargs.values()))
                if elsewhere(fake_layouts[index], layouts[index]):
                    misplacing.add(call.func)
            except Exception as error:
                pass_on(error)
                require_usable(device, call)
                if is_out_of_memory(error):
                    too_large.append(index)
                continue
            finally:
                args = kwargs = result = None  # before the next call's arguments are made
    workspace_bytes = meter.workspace_bytes()
    costs.workspace_ms += (time.perf_counter() - begin) * 1e3
    return {index: RunAlone(workspace_bytes[index], found) for index, found in layouts.items()}, too_large


def _make_up(call: Call) -> tuple[list[Any], dict[str, Any]]:
    name = str(call.func)
    if not name.startswith(("aten.", "prims.")) or name in _OPAQUE:
        raise ValueError("an operation that made-up data could crash")
    args, kwargs = [_value(a) for a in call.args], {name: _value(a) for name, a in call.kwargs}
    if name in _FILLED_BY_FORWARD:
        _FILLED_BY_FORWARD[name](args)
    return args, kwargs


def _fill_cudnn_reserve(args: list[Any]) -> None:
    """Run the forward of cuDNN's RNN, which alone can write the reserve that its backward reads."""
    with below_autograd():
        args[6], _, _, args[20], _ = find_overload("aten._cudnn_rnn.default")(*args[:6], *args[10:20])


def _fill_onednn_workspace(args: list[Any]) -> None:
    """Run the forward of oneDNN's RNN, which alone can write the workspace that its backward reads."""
    tensors = args[:7]  # input, four weights, hx, cx
    reverse, mode, hidden_size, num_layers, has_biases, train, bidirectional, batch_sizes, batch_first = args[13:22]
    with below_autograd():
        set_grad_mode(True)  # without it, forward returns no workspace
        args[7], args[8], args[9], args[22] = torch.ops.aten.mkldnn_rnn_layer.default(
            *tensors, reverse, batch_sizes, mode, hidden_size, num_layers, has_biases, bidirectional, batch_first, train
        )


#: Backward operations that read what only their forward can write.
_FILLED_BY_FORWARD = {
    "aten._cudnn_rnn_backward.default": _fill_cudnn_reserve,
    "aten.mkldnn_rnn_layer_backward.default": _fill_onednn_workspace,
}


def _value(argument: Any) -> Any:
    if isinstance(argument, TensorSpec):
        return _tensor(argument)
    if isinstance(argument, tuple):
        return [_value(a) for a in argument]
    if isinstance(argument, str) and argument.startswith("<"):
        raise ValueError("an argument that cannot be made up")
    return argument


def _fill(whole: torch.Tensor) -> None:
    """Write numbers between 0.1 and 0.9: the same few again and again, as drawing takes longer than most operations."""
    drawn, rest = whole[:_DRAWN].uniform_(0.1, 0.9), whole[_DRAWN:]
    if len(rest):
        times, left = divmod(len(rest), _DRAWN)
        rest[: times * _DRAWN].view(times, _DRAWN).copy_(drawn)
        rest[times * _DRAWN :].copy_(drawn[:left])


def _tensor(spec: TensorSpec) -> torch.Tensor:
    if spec.nbytes == 0:
        return torch.empty(spec.size, dtype=spec.dtype, device=spec.device)
    whole = torch.empty(spec.nbytes // spec.dtype.itemsize, dtype=spec.dtype, device=spec.device)
    if spec.dtype.is_floating_point:
        _fill(whole)
    elif spec.dtype.is_complex:
        _fill(torch.view_as_real(whole).view(-1))
    else:
        whole.fill_(1 if spec.dtype is torch.bool else 0)
    return whole.as_strided(spec.size, spec.stride, spec.offset)

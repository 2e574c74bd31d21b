"""What operations cost that no made-up data may be given to: metered where a step with data runs them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tightfit.device import Device
from tightfit.device.device import OperationTimes
from tightfit.profiling.cost_cache import Cost
from tightfit.profiling.signatures import Call

#: Runs of an opaque call, of which the fastest counts.
_ROUNDS = 3


def cost_of_opaque(call: Call, again: Callable[..., object], args: tuple[Any, ...], device: Device) -> Cost:
    """Return what an opaque call costs; `again` makes it, with the arguments that it was made with."""
    with device.workspace_meter() as meter, meter.watch(0):
        made = again(*args)
        device.synchronize()
    del made
    times = _opaque_times_ms(call, again, args, device)
    return Cost(round(times.host_ms, 6), meter.workspace_bytes()[0], (), round(times.device_ms, 6))


def _opaque_times_ms(call: Call, again: Callable[..., object], args: tuple[Any, ...], device: Device) -> OperationTimes:
    return device.operation_timer().times_ms(lambda: again(*args), _ROUNDS)


def cost_where_it_runs(call: Call, run: Callable[[], Any], device: Device) -> tuple[Any, Cost]:
    """Return the result of an operation that made-up data could crash, and what it costs where a real step runs it."""
    with device.workspace_meter() as meter, meter.watch(0):
        begin = time.perf_counter()
        result = run()
        submitted = time.perf_counter()
        device.synchronize()
        done = time.perf_counter()
    times = _once_times_ms(call, submitted - begin, 0.0 if device.is_host else done - begin)
    return result, Cost(round(times.host_ms, 6), meter.workspace_bytes()[0], (), round(times.device_ms, 6))


def _once_times_ms(call: Call, host_seconds: float, device_seconds: float) -> OperationTimes:
    return OperationTimes(host_seconds * 1e3, device_seconds * 1e3)

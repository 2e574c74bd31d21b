"""What the mechanism itself costs on this machine, per operation: so that plans are not drawn up as if it were free."""

from __future__ import annotations

import time
from typing import Any

import torch

from recollect._torch_private import DispatchMode
from recollect.measure.state import RandomState
from recollect.replay.session import Installed

_OPS = 64
_ROUNDS = 7


def measure_overhead() -> tuple[float, float]:
    """Milliseconds per operation: of running in a region's mode, and further of being taped and replayed.

    Measured on a chain of operations on one-element tensors, whose own time is taken off.
    """
    random_state = RandomState()
    weight = torch.ones(1, requires_grad=True)
    taped = Installed(recipes={}, calibrate=False)
    best = {"plain": float("inf"), "mode": float("inf"), "tape": float("inf")}
    with torch.enable_grad():
        for _ in range(_ROUNDS):
            for name in best:
                begin = time.perf_counter()
                if name == "plain":
                    result = _chain(weight)
                else:
                    with taped.region("<overhead>") if name == "tape" else _Idle():
                        result = _chain(weight)
                result.backward()
                best[name] = min(best[name], (time.perf_counter() - begin) * 1e3)
                weight.grad = None
    random_state.restore()
    mode_ms = max(0.0, best["mode"] - best["plain"]) / _OPS
    tape_ms = max(0.0, best["tape"] - best["plain"]) / _OPS - mode_ms
    return round(mode_ms, 6), round(max(0.0, tape_ms), 6)


class _Idle(DispatchMode):
    """A mode that only passes on."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def _chain(weight: torch.Tensor) -> torch.Tensor:
    x = weight
    for _ in range(_OPS):
        x = torch.sin(x)
    return x

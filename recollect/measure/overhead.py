"""What the mechanism itself costs on this machine, per operation: so that plans are not drawn up as if it were free.

Forward is measured as a model pays for it: before each operation other data streams through the caches, so that Python
finds its own code and objects cold.  In a loop of tiny operations the same takes a third of the time.  Backward cannot
be interrupted that way; what replay adds there is measured in such a loop, and scaled by what cold caches made of
forward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch

from recollect.measure.state import RandomState
from recollect.records import Recipe
from recollect.replay.recipe import LiveRecipe
from recollect.replay.session import Installed

_OPS = 16
_ROUNDS = 9
_KEY = "<overhead>"
#: More than a core's own caches hold.
_STREAMED_BYTES = 4 << 20


def measure_overhead(device: torch.device | str = "cpu") -> tuple[float, float]:
    """Milliseconds per operation: of running in a planned region, and further of being taped and replayed."""
    random_state = RandomState()
    passing, taped = _installed(), Installed(recipes={}, calibrate=False)
    contexts: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "plain": nullcontext,
        "mode": lambda: passing.region(_KEY),
        "tape": lambda: taped.region(_KEY),
    }
    weight = torch.full((1,), 0.5, device=device, requires_grad=True)
    gradient = torch.ones_like(weight)
    streamed = np.ones(_STREAMED_BYTES // 8)
    cold: dict[str, list[float]] = {name: [] for name in contexts}
    hot: dict[str, list[float]] = {name: [] for name in contexts}
    backward: dict[str, list[float]] = {name: [] for name in contexts}
    with torch.enable_grad():
        for _ in range(_ROUNDS):
            for name, context in contexts.items():
                with context():
                    _chain(weight, cold[name], streamed)
                with context():
                    result = _chain(weight, hot[name], None)
                begin = time.perf_counter()
                result.backward(gradient)
                backward[name].append((time.perf_counter() - begin) * 1e3 / _OPS)
                weight.grad = None
    random_state.restore()
    cold_ms, hot_ms, backward_ms = (
        {name: statistics.median(found) for name, found in times.items()} for times in (cold, hot, backward)
    )
    mode_ms = max(0.0, cold_ms["mode"] - cold_ms["plain"])
    record_ms = max(0.0, cold_ms["tape"] - cold_ms["mode"])
    scale = max(1.0, (cold_ms["tape"] - cold_ms["plain"]) / max(1e-6, hot_ms["tape"] - hot_ms["plain"]))
    replay_ms = scale * max(0.0, backward_ms["tape"] - backward_ms["plain"])
    return round(mode_ms, 6), round(record_ms + replay_ms, 6)


def _installed() -> Installed:
    """A plan for the chain that has no use for its operations."""
    recipe = Recipe(
        class_id=0,
        op_names=("aten.abs.default",) * _OPS,
        keep=(),
        drop=(),
        replay=(),
        held_bytes=0,
        dropped_bytes=0,
        replay_ms=0.0,
    )
    return Installed(recipes={f"{_KEY}#0": LiveRecipe(recipe)}, calibrate=False)


def _chain(weight: torch.Tensor, times_ms: list[float], streamed: npt.NDArray[np.float64] | None) -> torch.Tensor:
    """Operations of one element; notes what each took."""
    x = weight
    for _ in range(_OPS):
        if streamed is not None:
            streamed.sum()
        begin = time.perf_counter()
        # A view for every operation, as in real models: views are not taped, but the mode sees them, too.
        x = torch.abs(x.view(-1))
        times_ms.append((time.perf_counter() - begin) * 1e3)
    return x

"""What the mechanism itself costs on this machine, per operation: so that plans are not drawn up as if it were free.

Forward is measured as a model pays for it on a CPU: before each operation other data goes through the caches (see
`processor_caches`), so that Python finds its own code and objects cold.  Backward cannot be interrupted that way; what
replay adds there is measured in a loop, and scaled by what cold caches made of forward.  Where operations run on a GPU,
the processor's caches are Python's alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from recollect.measure.cost_cache import Cost, CostCache
from recollect.measure.processor_caches import fill_caches, forget
from recollect.measure.state import RandomState
from recollect.records import Recipe
from recollect.replay.recipe import LiveRecipe
from recollect.replay.session import Installed

_OPS = 16
_ROUNDS = 5
_KEY = "<overhead>"


def measure_overhead(device: torch.device, cache: CostCache) -> tuple[float, float]:
    """Milliseconds per operation: of running in a planned region, and further of being taped and replayed.

    Args:
        device: where the model's operations run.
        cache: what is known, and what is to be remembered.
    """
    mode, tape = (cache.get(f"{_KEY} {part}") for part in ("mode", "tape"))
    if mode is None or tape is None:
        mode_ms, tape_ms = _measure(cold=device.type == "cpu")
        mode, tape = Cost(mode_ms, 0, ()), Cost(tape_ms, 0, ())
        cache.put(f"{_KEY} mode", mode)
        cache.put(f"{_KEY} tape", tape)
        cache.save()
    return mode.ms, tape.ms


def _measure(cold: bool) -> tuple[float, float]:
    random_state = RandomState()
    passing, taped = _installed(), Installed(recipes={}, calibrate=False)
    contexts: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "plain": nullcontext,
        "mode": lambda: passing.region(_KEY),
        "tape": lambda: taped.region(_KEY),
    }
    # Small operations on the processor show what Python costs, whatever the model runs on.
    weight = torch.full((1,), 0.5, device="cpu", requires_grad=True)
    gradient = torch.ones_like(weight)
    forward: dict[str, list[float]] = {name: [] for name in contexts}
    hot: dict[str, list[float]] = {name: [] for name in contexts}
    backward: dict[str, list[float]] = {name: [] for name in contexts}
    with torch.enable_grad():
        for _ in range(_ROUNDS):
            for name, context in contexts.items():
                with context():
                    _chain(weight, forward[name], cold)
                with context():
                    result = _chain(weight, hot[name], False)
                begin = time.perf_counter()
                result.backward(gradient)
                backward[name].append((time.perf_counter() - begin) * 1e3 / _OPS)
                weight.grad = None
    random_state.restore()
    forget()
    forward_ms, hot_ms, backward_ms = (
        {name: statistics.median(found) for name, found in times.items()} for times in (forward, hot, backward)
    )
    mode_ms = max(0.0, forward_ms["mode"] - forward_ms["plain"])
    record_ms = max(0.0, forward_ms["tape"] - forward_ms["mode"])
    scale = max(1.0, (forward_ms["tape"] - forward_ms["plain"]) / max(1e-6, hot_ms["tape"] - hot_ms["plain"]))
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


def _chain(weight: torch.Tensor, times_ms: list[float], cold: bool) -> torch.Tensor:
    """Operations of one element; notes what each took."""
    x = weight
    for _ in range(_OPS):
        if cold:
            fill_caches()
        begin = time.perf_counter()
        # A view for every operation, as in real models: views are not taped, but the mode sees them, too.
        x = torch.abs(x.view(-1))
        times_ms.append((time.perf_counter() - begin) * 1e3)
    return x

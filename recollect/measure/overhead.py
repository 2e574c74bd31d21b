"""What the mechanism itself costs on this machine, per operation: so that plans are not drawn up as if it were free.

A region's mode is measured where it is paid: between operations that stream a megabyte through the caches, so that
Python finds its own code and objects cold each time.  Writing down and replaying cannot be told there from what the
operations themselves do to the caches, so that is measured on operations of one element, and scaled by what the cold
caches made of the mode.
"""

from __future__ import annotations

import time

import torch

from recollect.measure.state import RandomState
from recollect.records import Recipe
from recollect.replay.recipe import LiveRecipe
from recollect.replay.session import Installed

_OPS = 24
_ELEMENTS = 1 << 18
_ROUNDS = 15
_KEY = "<overhead>"
#: The most that cold caches make of the time of the same Python code.
_MOST_SCALE = 8.0


def measure_overhead(device: torch.device | str = "cpu") -> tuple[float, float]:
    """Milliseconds per operation: of running in a planned region, and further of being taped and replayed.

    Shortest times of interleaved rounds, less that of the plain chain.
    """
    random_state = RandomState()
    passing = _installed()
    taped = Installed(recipes={}, calibrate=False)
    best: dict[str, float] = {}
    with torch.enable_grad():
        for size, elements, kinds in (
            ("large", _ELEMENTS, {"plain": None, "mode": passing}),
            ("small", 1, {"plain": None, "mode": passing, "tape": taped}),
        ):
            weight = torch.full((elements,), 0.5, device=device, requires_grad=True)
            for _ in range(_ROUNDS):
                for kind, installed in kinds.items():
                    name = f"{size} {kind}"
                    best[name] = min(best.get(name, float("inf")), _run_ms(weight, installed))
    random_state.restore()
    mode_ms = max(0.0, best["large mode"] - best["large plain"]) / _OPS
    small_mode_ms = max(1e-6, best["small mode"] - best["small plain"]) / _OPS
    small_tape_ms = max(0.0, best["small tape"] - best["small mode"]) / _OPS
    mode_ms = max(mode_ms, small_mode_ms)
    scale = min(mode_ms / small_mode_ms, _MOST_SCALE)
    return round(mode_ms, 6), round(small_tape_ms * scale, 6)


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


def _run_ms(weight: torch.Tensor, installed: Installed | None) -> float:
    """Time of the chain's forward and backward; on CUDA, until all is submitted."""
    gradient = torch.ones_like(weight)
    if weight.device.type == "cuda":
        torch.cuda.synchronize(weight.device)
    begin = time.perf_counter()
    if installed is None:
        result = _chain(weight)
    else:
        with installed.region(_KEY):
            result = _chain(weight)
    result.backward(gradient)
    elapsed_ms = (time.perf_counter() - begin) * 1e3
    weight.grad = None
    return elapsed_ms


def _chain(weight: torch.Tensor) -> torch.Tensor:
    x = weight
    for _ in range(_OPS):
        # A view for every operation, as in real models: views are not taped, but the mode sees them, too.
        x = torch.abs(x.view(-1))
    return x

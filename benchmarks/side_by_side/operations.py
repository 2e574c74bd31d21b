"""Which operations a step runs, and how long each takes: the table that prices every method's recomputation alike."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tightfit.replay.tape import Tape

#: Of one operation: its name, and the shapes, strides and types it runs on.
Signature = tuple[Any, ...]


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Signature] = Counter()
        self.times_ms: dict[Signature, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.note(func, args, kwargs or {})

    def note(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation and write it down."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        signature = (str(func), *((tuple(t.shape), t.stride(), str(t.dtype)) for t in tensors))
        begin = time.perf_counter()
        out = func(*args, **kwargs)
        took_ms = (time.perf_counter() - begin) * 1e3
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.counts[signature] += 1
            self.times_ms[signature].append(took_ms)
        return out


@contextmanager
def _replays_noted(mode: _Count) -> Iterator[None]:
    """tightfit replays below every dispatch mode: what it runs there is noted, too."""
    run = Tape._run

    def noted(self: Tape, op: Any, passing: Any) -> None:
        func = op.func
        op.func = lambda *args, **kwargs: mode.note(func, args, kwargs)
        try:
            run(self, op, passing)
        finally:
            op.func = func

    Tape._run = noted
    try:
        yield
    finally:
        Tape._run = run


def count(step: Callable[[], Any], steps: int = 3) -> tuple[Counter[Signature], dict[Signature, float]]:
    """How often each operation runs in a step, and its median milliseconds within it."""
    mode = _Count()
    with mode, _replays_noted(mode):
        for _ in range(steps):
            step()
    counts = Counter({signature: found // steps for signature, found in mode.counts.items()})
    return counts, {signature: statistics.median(times) for signature, times in mode.times_ms.items()}


def recompute_ms(
    counts: Counter[Signature],
    own_ms: dict[Signature, float],
    plain: Counter[Signature],
    table_ms: dict[Signature, float],
) -> float:
    """Milliseconds of what a method runs more often than the plain step, by the plain step's own times."""
    return sum(
        extra * table_ms.get(signature, own_ms[signature])
        for signature, number in counts.items()
        if (extra := number - plain[signature]) > 0
    )
